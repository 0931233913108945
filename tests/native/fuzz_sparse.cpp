// Random shapes, layouts and values through the kernels of sparse teachers, against the definition in plain double.
//
//     fuzz_sparse [seconds] [seed]
//
// Built with AddressSanitizer and UndefinedBehaviorSanitizer; every buffer has exactly the size it must have.
#include "fuzz.h"
#include "kdlab_sparse.h"

namespace {

struct Row { double value; std::vector<double> grad; };          // d value / d (s / T)

// The definitions in the table of csrc/cpu/sparse.h, one class at a time; the student is finite.
Row definition(const std::vector<double>& s, const std::vector<double>& p_kept, double T, int tail, bool reverse) {
    const size_t C = s.size();
    std::vector<double> p = p_kept, lq(C), q(C);
    double top = -INFINITY, sum = 0, mass = 0, Q = 0, others = 0;
    for (double x : s) top = std::fmax(top, x);
    for (double x : s) sum += std::exp((x - top) / T);
    for (size_t i = 0; i < C; ++i) {
        q[i] = std::exp(lq[i] = (s[i] - top) / T - std::log(sum));
        if (p[i] >= 0) mass += p[i], Q += q[i];
        else ++others;
    }
    double w = 0;
    for (size_t i = 0; i < C; ++i) w += p[i] < 0 ? q[i] : 0;
    double rest = tail < KDLAB_BUCKET || 1 - mass < 1e-6 || others == 0 ? 0 : 1 - mass;
    if (tail != KDLAB_DROP && rest == 0 && mass > 0)
        for (double& x : p) x = x < 0 ? x : x / mass;
    const double all = tail == KDLAB_DROP ? mass : mass > 0 || rest > 0 ? 1 : 0;
    Row r{0, std::vector<double>(C)};
    if (reverse) {
        for (size_t i = 0; i < C; ++i) r.value += p[i] >= 0 ? q[i] * (lq[i] - std::log(p[i])) : 0;
        if (others > 0) r.value += w * (std::log(w) - std::log(rest));
        for (size_t i = 0; i < C; ++i)
            r.grad[i] = q[i] * ((p[i] >= 0 ? lq[i] - std::log(p[i]) : std::log(w / rest)) - r.value);
        return r;
    }
    for (size_t i = 0; i < C; ++i) {
        const bool kept = p[i] >= 0;
        if (kept && p[i] > 0) r.value += p[i] * (std::log(p[i]) - lq[i]);
        r.grad[i] = all * q[i] - (kept ? p[i] : 0);
        if (kept || rest == 0) continue;
        if (tail == KDLAB_BUCKET) r.grad[i] -= rest * q[i] / w;
        if (tail != KDLAB_UNIFORM) continue;
        r.value += rest / others * (std::log(rest / others) - lq[i]);
        r.grad[i] -= rest / others;
    }
    if (tail == KDLAB_BUCKET && rest > 0) r.value += rest * std::log(rest / w);
    return r;
}

[[noreturn]] void fail(const kdlab_sparse& a, const char* isa, const char* what, int64_t row, double got, double want) {
    std::printf("FAILED %s at row %lld: got %.17g, want %.17g\n  %s dtype %d, %lld x %lld, k %lld, T %g, tail %d, "
                "reverse %d\n", what, (long long)row, got, want, isa, a.dtype, (long long)a.rows, (long long)a.cols,
                (long long)a.k, a.T, a.tail, a.reverse);
    std::exit(1);
}

void once(Random& r, const char* isa) {
    static const int64_t columns[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 507, 1271};
    static const double temperatures[] = {0.5, 1, 4, 20};
    kdlab_sparse a = {};
    a.dtype = static_cast<int>(pick(r, 3));
    a.loss_dtype = a.dtype == KDLAB_F64 ? KDLAB_F64 : KDLAB_F32;
    a.cols = columns[pick(r, 16)];
    a.rows = pick(r, a.cols > 500 ? 6 : 40);
    a.k = chance(r, .1) ? a.cols : pick(r, a.cols < 20 ? a.cols + 1 : 20);
    a.student_stride = a.cols + (chance(r, .3) ? pick(r, 9) : 0);
    a.T = temperatures[pick(r, 4)];
    a.factor = chance(r, .5) ? a.T * a.T : 1;
    a.tail = static_cast<int>(pick(r, 4));
    a.reverse = a.tail == KDLAB_BUCKET && chance(r, .5);
    a.reduction = KDLAB_NONE;
    a.normalizer = NAN;

    Array s(a.dtype, a.rows ? (a.rows - 1) * a.student_stride + a.cols : 0);
    std::unique_ptr<double[]> lp(new double[a.rows * a.k]);
    std::unique_ptr<int64_t[]> ids(new int64_t[a.rows * a.k]);
    std::unique_ptr<uint8_t[]> mask(new uint8_t[a.rows]);
    std::vector<std::vector<double>> p(a.rows, std::vector<double>(a.cols, -1));
    std::normal_distribution<> normal;
    const double spread = 2 * a.T, near = chance(r, .3) ? .1 : 1;
    std::vector<int> odd(a.rows);                                // 1: NaN somewhere, 2: bad
    for (int64_t i = 0; i < a.rows; ++i) {
        mask[i] = !chance(r, .2);
        std::vector<double> t(a.cols);
        std::vector<int64_t> order(a.cols);
        double sum = 0;
        for (int64_t j = 0; j < a.cols; ++j) {
            t[j] = spread * normal(r);
            s.set(i * a.student_stride + j, t[j] + near * spread * normal(r));
            sum += std::exp(t[j] / a.T);
            std::swap(order[j] = j, order[pick(r, j + 1)]);
        }
        for (int64_t j = 0; j < a.k; ++j) {
            const bool padding = chance(r, .1);
            lp[i * a.k + j] = padding ? -INFINITY : t[order[j]] / a.T - std::log(sum);
            ids[i * a.k + j] = padding ? pick(r, 2) * 99999 - 1 : order[j];
            if (!padding) p[i][order[j]] = std::exp(lp[i * a.k + j]);
        }
        if (a.k && chance(r, .05)) odd[i] = 1, lp[i * a.k] = NAN, ids[i * a.k] = order[0];
        if (chance(r, .05)) odd[i] = 1, s.set(i * a.student_stride + pick(r, a.cols), chance(r, .5) ? NAN : INFINITY);
        if (a.k > 1 && chance(r, .05))
            odd[i] = 2, lp[i * a.k] = lp[i * a.k + 1] = -5, ids[i * a.k] = 0, ids[i * a.k + 1] = chance(r, .5) ? 0 : a.cols;
    }
    Array grad(a.dtype, a.rows * a.cols), again(a.dtype, a.rows * a.cols);
    Array out(a.loss_dtype, a.rows), out2(a.loss_dtype, a.rows);
    a.student = s.bytes.get();
    a.log_probs = lp.get();
    a.ids = ids.get();
    a.mask = chance(r, .5) ? mask.get() : nullptr;
    a.grad = grad.bytes.get();
    a.out = out.bytes.get();
    a.threads = 1;
    const int64_t bad = kdlab_sparse_cpu(&a);
    kdlab_sparse b = a;
    b.grad = again.bytes.get();
    b.out = out2.bytes.get();
    b.threads = 2;
    kdlab_sparse_cpu(&b);
    if (!out2.equals(out) || !again.equals(grad)) fail(a, isa, "threads", 0, 0, 0);

    int64_t first = -1;
    const double eps = a.dtype == KDLAB_F64 ? 1e-11 : 2e-6, rounding = a.dtype == KDLAB_BF16 ? 4e-3 : 0;
    for (int64_t i = 0; i < a.rows; ++i) {
        const bool counts = !a.mask || mask[i];
        if (counts && odd[i] == 2 && first < 0) first = i;
        std::vector<double> x(a.cols);
        for (int64_t j = 0; j < a.cols; ++j) x[j] = s.get(i * a.student_stride + j);
        Row want{0, std::vector<double>(a.cols)};
        if (counts && odd[i]) want = {NAN, std::vector<double>(a.cols, NAN)};
        else if (counts) want = definition(x, p[i], a.T, a.tail, a.reverse);
        const double got = out.get(i), value = a.factor * want.value;
        const double slack = eps * a.factor * (1 + std::fabs(want.value));
        if (!same(got, value, slack)) fail(a, isa, "value", i, got, value);
        for (int64_t j = 0; j < a.cols; ++j) {
            const double g = grad.get(i * a.cols + j), h = a.factor / a.T * want.grad[j];
            if (!same(g, h, slack / a.T + rounding * std::fabs(h))) fail(a, isa, "gradient", i, g, h);
        }
    }
    if (first != bad) fail(a, isa, "bad row", first, double(bad), double(first));
}

}  // namespace

int main(int argc, char** argv) { return fuzz(argc, argv, once); }
