// Random shapes and values through the kernels of features, of Gram matrices, of angles and of DIST, against the equations in
// plain double.
//
//     fuzz_features [seconds] [seed]
//
// Built with AddressSanitizer and UndefinedBehaviorSanitizer; every buffer has exactly the size it must have. Each case
// is computed with one, two and four threads, whose results must be the same bits.
#include <algorithm>

#include "fuzz.h"
#include "kdlab_features.h"

namespace {

[[noreturn]] void fail(const char* isa, const char* what, int dtype, int64_t a, int64_t b, double got, double want) {
    std::printf("FAILED %s (%s, dtype %d) at %lld %lld: got %.17g, want %.17g\n", what, isa, dtype, (long long)a, (long long)b,
                got, want);
    std::exit(1);
}

double dot(const Numbers& a, const Numbers& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
}

struct Result { double value; Numbers grad; };      // of a sample, with its gradient in the student

// Of the directions of a and b: |a/|a| - b/|b||^2 and its gradient in a
Result gap(const Numbers& a, const Numbers& b) {
    const double la = std::sqrt(dot(a, a)), lb = std::sqrt(dot(b, b)), cosine = dot(a, b) / (la * lb);
    Result r{2 - 2 * cosine, Numbers(a.size())};
    for (size_t i = 0; i < a.size(); ++i) r.grad[i] = -2 * (b[i] / lb - cosine * a[i] / la) / la;
    return r;
}

// Which cells of m average which pixels of n: torch's adaptive pooling
Numbers pooled(const Numbers& x, const int64_t* shape, int64_t h, int64_t w, bool transposed = false) {
    Numbers out(transposed ? shape[1] * shape[2] : h * w);
    for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < w; ++j) {
            const int64_t top = i * shape[1] / h, bottom = ((i + 1) * shape[1] + h - 1) / h;
            const int64_t left = j * shape[2] / w, right = ((j + 1) * shape[2] + w - 1) / w;
            for (int64_t y = top; y < bottom; ++y)
                for (int64_t z = left; z < right; ++z) {
                    const double share = 1.0 / double((bottom - top) * (right - left));
                    if (transposed) out[y * shape[2] + z] += share * x[i * w + j];
                    else out[i * w + j] += share * x[y * shape[2] + z];
                }
        }
    return out;
}

Numbers squares(const Numbers& x, const int64_t* shape) {
    const int64_t pixels = shape[1] * shape[2];
    Numbers map(pixels);
    for (size_t i = 0; i < x.size(); ++i) map[i % pixels] += x[i] * x[i] / double(shape[0]);
    return map;
}

Result attention(const Numbers& s, const Numbers& t, const int64_t* ss, const int64_t* ts) {
    const int64_t h = std::min(ss[1], ts[1]), w = std::min(ss[2], ts[2]), pixels = ss[1] * ss[2];
    const Result r = gap(pooled(squares(s, ss), ss, h, w), pooled(squares(t, ts), ts, h, w));
    const Numbers slope = pooled(r.grad, ss, h, w, true);
    Result out{r.value / double(h * w), Numbers(s.size())};
    for (size_t i = 0; i < s.size(); ++i) out.grad[i] = 2 * s[i] * slope[i % pixels] / double(ss[0] * h * w);
    return out;
}

Result definition(int loss, const Numbers& s, const Numbers& t, const int64_t* ss, const int64_t* ts) {
    if (loss == KDLAB_ATTENTION) return attention(s, t, ss, ts);
    const double n = double(s.size());
    Result r = loss == KDLAB_HINT ? Result{0, Numbers(s.size())} : gap(s, t);
    const double share = loss == KDLAB_COSINE ? 0.5 : 1 / n;
    for (size_t i = 0; loss == KDLAB_HINT && i < s.size(); ++i) {
        r.value += (s[i] - t[i]) * (s[i] - t[i]);
        r.grad[i] = 2 * (s[i] - t[i]);
    }
    r.value *= share;
    for (double& g : r.grad) g *= share;
    return r;
}

void one_of_features(Random& r, const char* isa) {
    static const int dtypes[] = {KDLAB_F32, KDLAB_F64, KDLAB_BF16};
    kdlab_features a = {};
    a.loss = static_cast<int>(pick(r, 4));
    a.dtype = dtypes[pick(r, 3)];
    a.loss_dtype = a.dtype == KDLAB_F64 ? KDLAB_F64 : KDLAB_F32;
    a.samples = pick(r, 7);
    const bool maps = a.loss == KDLAB_ATTENTION;
    for (int k = 0; k < 3; ++k) a.student_shape[k] = 1 + pick(r, k || !maps ? 20 : 30);
    if (!maps) a.student_shape[0] *= 1 + pick(r, 8);
    if (chance(r, .05)) a.student_shape[0] = 0;
    for (int k = 0; k < 3; ++k) a.teacher_shape[k] = maps && chance(r, .5) ? 1 + pick(r, 20) : a.student_shape[k];
    a.reduction = static_cast<int>(pick(r, 3));
    const int64_t n = a.student_shape[0] * a.student_shape[1] * a.student_shape[2];
    const int64_t m = a.teacher_shape[0] * a.teacher_shape[1] * a.teacher_shape[2];
    Array s(a.dtype, a.samples * n), t(a.dtype, a.samples * m);
    std::normal_distribution<> normal;
    const bool close = !maps && chance(r, .3);
    for (int64_t i = 0; i < t.count; ++i) t.set(i, normal(r) + 0.2);
    for (int64_t i = 0; i < s.count; ++i) s.set(i, close ? t.get(i) * 1.01 + 0.05 * normal(r) : normal(r));
    std::unique_ptr<uint8_t[]> mask(new uint8_t[a.samples]);
    for (int64_t i = 0; i < a.samples; ++i) {
        mask[i] = !chance(r, .2);
        if (!mask[i] && n) s.set(i * n, NAN);
    }
    a.student = s.data();
    a.teacher = t.data();
    a.mask = mask.get();
    const int64_t outs = a.reduction == KDLAB_NONE ? a.samples : 1;
    Array incoming(a.loss_dtype, outs), out(a.loss_dtype, outs), grad(a.dtype, s.count);
    for (int64_t i = 0; i < outs; ++i) incoming.set(i, normal(r));
    a.grad_in = incoming.data();
    for (int threads : {1, 2, 4}) {
        Array value(a.loss_dtype, outs), slopes(a.dtype, s.count);
        a.threads = threads;
        a.out = value.data();
        a.grad = slopes.data();
        kdlab_features_cpu(&a);
        if (threads > 1 && !(value.equals(out) && slopes.equals(grad))) fail(isa, "threads", a.dtype, threads, a.loss, 0, 0);
        out.bytes.swap(value.bytes);
        grad.bytes.swap(slopes.bytes);
    }

    double total = 0, counted = 0;
    for (int64_t i = 0; i < a.samples; ++i) counted += mask[i];
    const double denominator = a.reduction == KDLAB_MEAN ? std::max(1.0, counted) : 1;
    const double eps = a.dtype == KDLAB_F64 ? 1e-11 : 3e-6, rounding = a.dtype == KDLAB_BF16 ? 4e-3 : 0;
    for (int64_t i = 0; i < a.samples; ++i) {
        Result want{0, Numbers(n)};
        const bool real = mask[i] && n && m;
        if (real) want = definition(a.loss, s.part(i * n, n), t.part(i * m, m), a.student_shape, a.teacher_shape);
        total += want.value;
        if (a.reduction == KDLAB_NONE && std::fabs(out.get(i) - want.value) > eps * (1 + want.value))
            fail(isa, "value", a.dtype, a.loss, i, out.get(i), want.value);
        const double g = incoming.get(a.reduction == KDLAB_NONE ? i : 0) / denominator;
        double top = 1e-3 / double(std::max<int64_t>(1, n));
        for (double x : want.grad) top = std::max(top, std::fabs(x));
        for (int64_t j = 0; j < n; ++j) {
            const double got = grad.get(i * n + j), right = g * want.grad[j];
            if (!(std::fabs(got - right) <= 4 * eps * std::fabs(g) * top + rounding * std::fabs(right)))
                fail(isa, "gradient", a.dtype, a.loss, j, got, right);
        }
    }
    if (a.reduction != KDLAB_NONE && std::fabs(out.get(0) - total / denominator) > eps * (1 + total / denominator))
        fail(isa, "sum", a.dtype, a.loss, 0, out.get(0), total / denominator);
}

// Samples as rows: widened, those that do not count zero, about their mean where asked
std::vector<Numbers> rows_of(const Array& x, int64_t B, int64_t n, const uint8_t* mask, bool centre) {
    std::vector<Numbers> rows(B, Numbers(n));
    double counted = 0;
    for (int64_t i = 0; i < B; ++i) counted += !mask || mask[i];
    for (int64_t i = 0; i < B; ++i)
        if (!mask || mask[i]) rows[i] = x.part(i * n, n);
    for (int64_t c = 0; c < n && centre; ++c) {
        double mean = 0;
        for (const Numbers& row : rows) mean += row[c] / std::max(1.0, counted);
        for (int64_t i = 0; i < B; ++i)
            if (!mask || mask[i]) rows[i][c] -= mean;
    }
    return rows;
}

void one_of_grams(Random& r, const char* isa) {
    static const int dtypes[] = {KDLAB_F32, KDLAB_F64, KDLAB_BF16};
    kdlab_gram a = {};
    a.student_dtype = dtypes[pick(r, 3)];
    a.teacher_dtype = dtypes[pick(r, 3)];
    const bool pair = chance(r, .5), masked = chance(r, .5);
    const bool f64 = a.student_dtype == KDLAB_F64 || (pair && a.teacher_dtype == KDLAB_F64);
    a.wide = f64 || chance(r, .3) ? KDLAB_F64 : KDLAB_F32;
    a.centre = !pair && chance(r, .5);
    const int64_t B = a.count = 1 + pick(r, 20), n = a.columns = chance(r, .1) ? 20000 + pick(r, 100) : 1 + pick(r, 200);
    Array s(a.student_dtype, B * n), t(a.teacher_dtype, B * n), weights(KDLAB_F64, B * B);
    std::normal_distribution<> normal;
    for (int64_t i = 0; i < B * n; ++i) s.set(i, normal(r)), t.set(i, normal(r));
    for (int64_t i = 0; i < B * B; ++i) weights.set(i, normal(r));
    std::unique_ptr<uint8_t[]> mask(new uint8_t[B]);
    for (int64_t i = 0; i < B; ++i) {
        mask[i] = !chance(r, .2);
        if (masked && !mask[i]) s.set(i * n, NAN);
    }
    a.student = s.data();
    a.mask = masked ? mask.get() : nullptr;
    Array G(KDLAB_F64, B * B), H(KDLAB_F64, B * B), grad(a.student_dtype, B * n);
    for (int threads : {1, 2, 4}) {
        Array first(KDLAB_F64, B * B), second(KDLAB_F64, B * B), slopes(a.student_dtype, B * n);
        a.threads = threads;
        a.teacher = pair ? t.data() : nullptr;
        a.gram = static_cast<double*>(first.data());
        a.teacher_gram = pair ? static_cast<double*>(second.data()) : nullptr;
        a.slopes = nullptr;
        a.grad = nullptr;
        kdlab_gram_cpu(&a);
        a.teacher = nullptr;
        a.slopes = static_cast<const double*>(weights.data());
        a.grad = slopes.data();
        kdlab_gram_cpu(&a);
        if (threads > 1 && !(first.equals(G) && second.equals(H) && slopes.equals(grad)))
            fail(isa, "threads of Gram", a.wide, threads, B, 0, 0);
        G.bytes.swap(first.bytes);
        H.bytes.swap(second.bytes);
        grad.bytes.swap(slopes.bytes);
    }
    const auto x = rows_of(s, B, n, a.mask, a.centre), y = rows_of(t, B, n, a.mask, false);
    const double eps = a.wide == KDLAB_F64 ? 1e-12 : 1e-6;
    const double rounding = a.student_dtype == KDLAB_BF16 ? 4e-3 : a.student_dtype == KDLAB_F32 ? 1e-7 : 0;
    for (int64_t i = 0; i < B; ++i)
        for (int64_t j = 0; j < B; ++j) {
            const double scale = std::sqrt((dot(x[i], x[i]) + dot(y[i], y[i])) * (dot(x[j], x[j]) + dot(y[j], y[j]))) + 1e-9;
            const double want = dot(x[i], x[j]), other = pair ? dot(y[i], y[j]) : 0;
            const double got = G.get(i * B + j), second = H.get(i * B + j);
            if (!(std::fabs(got - want) <= 4 * eps * scale)) fail(isa, "Gram", a.wide, i, j, got, want);
            if (!(std::fabs(second - other) <= 4 * eps * scale)) fail(isa, "other Gram", a.wide, i, j, second, other);
        }
    double counted = 0;
    for (int64_t i = 0; i < B; ++i) counted += !masked || mask[i];
    for (int64_t c = 0; c < n; ++c) {
        Numbers want(B);
        double top = 1, mean = 0;
        for (int64_t i = 0; i < B; ++i)
            for (int64_t j = 0; j < B && (!masked || mask[i]); ++j) {
                const double term = (weights.get(i * B + j) + weights.get(j * B + i)) * x[j][c];
                want[i] += term;
                top = std::max(top, std::fabs(term));
                if (a.centre) mean += term / counted;
            }
        for (int64_t i = 0; i < B; ++i) {
            const double got = grad.get(i * n + c), right = masked && !mask[i] ? 0 : want[i] - mean;
            if (!(std::fabs(got - right) <= 20 * eps * top + rounding * std::fabs(right)))
                fail(isa, "product", a.wide, i, c, got, right);
        }
    }
}

// One over the distance from b to a, and the direction; none where they are the same.
struct Side {
    double inverse = 0;
    Numbers unit;
    Side(const Numbers& a, const Numbers& b) : unit(a.size()) {
        for (size_t i = 0; i < a.size(); ++i) unit[i] = a[i] - b[i];
        const double square = dot(unit, unit);
        if (square > 0) inverse = 1 / std::sqrt(square);
        for (double& x : unit) x *= inverse;
    }
};

void one_of_angles(Random& r, const char* isa) {
    const int64_t B = 1 + pick(r, 27), n = 2 + pick(r, 5);
    std::normal_distribution<> normal;
    std::vector<Numbers> s(B, Numbers(n)), t(B, Numbers(n));
    std::unique_ptr<uint8_t[]> mask(new uint8_t[B]);
    const bool masked = chance(r, .5);
    for (int64_t i = 0; i < B; ++i) {
        mask[i] = !chance(r, .2);
        for (double& x : s[i]) x = normal(r);
        for (double& x : t[i]) x = normal(r);
        if (i && chance(r, .1)) s[i] = s[i - 1];
        if (i && chance(r, .1)) t[i] = t[i - 1];
    }
    Array G(KDLAB_F64, B * B), H(KDLAB_F64, B * B), out(KDLAB_F64, 1), grad(KDLAB_F64, B * B);
    for (int64_t i = 0; i < B; ++i)
        for (int64_t j = 0; j < B; ++j) {
            G.set(i * B + j, dot(s[i], s[j]));
            H.set(i * B + j, dot(t[i], t[j]));
        }
    kdlab_angles a = {};
    a.student = static_cast<const double*>(G.data());
    a.teacher = static_cast<const double*>(H.data());
    a.mask = masked ? mask.get() : nullptr;
    a.count = B;
    for (int threads : {1, 2, 4}) {
        Array value(KDLAB_F64, 1), slopes(KDLAB_F64, B * B);
        a.threads = threads;
        a.out = static_cast<double*>(value.data());
        a.grad = static_cast<double*>(slopes.data());
        kdlab_angles_cpu(&a);
        if (threads > 1 && !(value.equals(out) && slopes.equals(grad)))
            fail(isa, "threads of angles", KDLAB_F64, threads, B, 0, 0);
        out.bytes.swap(value.bytes);
        grad.bytes.swap(slopes.bytes);
    }
    a.grad = nullptr;
    Array alone(KDLAB_F64, 1);
    a.out = static_cast<double*>(alone.data());
    kdlab_angles_cpu(&a);

    double want = 0, top = 1e-3;
    std::vector<Numbers> slope(B, Numbers(n));
    for (int64_t j = 0; j < B; ++j)
        for (int64_t i = 0; i < B; ++i)
            for (int64_t k = 0; k < B; ++k) {
                if (masked && !(mask[i] && mask[j] && mask[k])) continue;
                const Side x(s[i], s[j]), y(s[k], s[j]), u(t[i], t[j]), v(t[k], t[j]);
                const double cosine = dot(x.unit, y.unit), d = cosine - dot(u.unit, v.unit);
                const double g = std::max(-1.0, std::min(1.0, d));
                want += g * (d - g / 2);
                for (int64_t m = 0; m < n; ++m) {
                    const double di = g * (y.unit[m] - cosine * x.unit[m]) * x.inverse;
                    const double dk = g * (x.unit[m] - cosine * y.unit[m]) * y.inverse;
                    slope[i][m] += di;
                    slope[k][m] += dk;
                    slope[j][m] -= di + dk;
                }
            }
    for (double got : {out.get(0), alone.get(0)})
        if (!(std::fabs(got - want) <= 1e-10 * (1 + want))) fail(isa, "angles", KDLAB_F64, B, n, got, want);
    for (const Numbers& row : slope)
        for (double x : row) top = std::max(top, std::fabs(x));
    for (int64_t i = 0; i < B; ++i)
        for (int64_t m = 0; m < n; ++m) {
            double got = 0;
            for (int64_t k = 0; k < B; ++k) got += (grad.get(i * B + k) + grad.get(k * B + i)) * s[k][m];
            if (!(std::fabs(got - slope[i][m]) <= 1e-8 * top))
                fail(isa, "slope of angles", KDLAB_F64, i, m, got, slope[i][m]);
        }
}

// 1 - Pearson of rows of both, and its gradient in a; a constant has no correlation and no slope.
Result apart(Numbers a, Numbers b) {
    double mean_a = 0, mean_b = 0;
    const double n = double(a.size());
    for (size_t i = 0; i < a.size(); ++i) mean_a += a[i] / n, mean_b += b[i] / n;
    for (double& x : a) x -= mean_a;
    for (double& x : b) x -= mean_b;
    if (n < 3 || dot(a, a) == 0 || dot(b, b) == 0) return {n < 2 ? 1 : gap(a, b).value / 2, Numbers(a.size())};
    Result r = gap(a, b);
    for (double& x : r.grad) x /= 2;
    return {r.value / 2, r.grad};
}

Numbers softmax(Numbers x, double T) {
    double top = -INFINITY, sum = 0;
    for (double v : x) top = std::max(top, v);
    for (double& v : x) sum += v = std::exp((v - top) / T);
    for (double& v : x) v /= sum;
    return x;
}

void one_of_dist(Random& r, const char* isa) {
    static const int dtypes[] = {KDLAB_F32, KDLAB_F64, KDLAB_BF16};
    static const double temperatures[] = {0.5, 1, 4};
    kdlab_dist a = {};
    a.dtype = dtypes[pick(r, 3)];
    a.loss_dtype = a.dtype == KDLAB_F64 ? KDLAB_F64 : KDLAB_F32;
    a.rows = 3 + pick(r, 40);
    a.cols = 3 + pick(r, 70);
    a.student_stride = a.cols + pick(r, 4);
    a.teacher_stride = a.cols + pick(r, 4);
    a.T = temperatures[pick(r, 3)];
    a.factor = chance(r, .5) ? a.T * a.T : 1;
    Array s(a.dtype, (a.rows - 1) * a.student_stride + a.cols), t(a.dtype, (a.rows - 1) * a.teacher_stride + a.cols);
    std::normal_distribution<> normal;
    for (int64_t i = 0; i < s.count; ++i) s.set(i, 2 * normal(r));
    for (int64_t i = 0; i < t.count; ++i) t.set(i, 2 * normal(r));
    std::unique_ptr<uint8_t[]> mask(new uint8_t[a.rows]);
    std::vector<int64_t> kept;
    for (int64_t i = 0; i < a.rows; ++i) {
        mask[i] = i < 3 || !chance(r, .2);
        if (mask[i]) kept.push_back(i);
        else s.set(i * a.student_stride, NAN);
    }
    a.student = s.data();
    a.teacher = t.data();
    a.mask = mask.get();
    Array out(a.loss_dtype, 1), grad(a.dtype, a.rows * a.cols);
    for (int threads : {1, 2, 4}) {
        Array value(a.loss_dtype, 1), slopes(a.dtype, a.rows * a.cols);
        a.threads = threads;
        a.out = value.data();
        a.grad = slopes.data();
        kdlab_dist_cpu(&a);
        if (threads > 1 && !(value.equals(out) && slopes.equals(grad))) fail(isa, "threads of DIST", a.dtype, threads, 0, 0, 0);
        out.bytes.swap(value.bytes);
        grad.bytes.swap(slopes.bytes);
    }

    const size_t B = kept.size();
    std::vector<Numbers> p(B), q(B), slope(B, Numbers(a.cols));
    double value = 0;
    for (size_t i = 0; i < B; ++i) {
        p[i] = softmax(s.part(kept[i] * a.student_stride, a.cols), a.T);
        q[i] = softmax(t.part(kept[i] * a.teacher_stride, a.cols), a.T);
        const Result x = apart(p[i], q[i]);
        value += x.value / double(B);
        for (int64_t j = 0; j < a.cols; ++j) slope[i][j] += x.grad[j] / double(B);
    }
    double flattest = 1;                               // a column of next to equal numbers: how many times what they differ by
    for (int64_t j = 0; j < a.cols; ++j) {
        Numbers x(B), y(B);
        for (size_t i = 0; i < B; ++i) x[i] = p[i][j], y[i] = q[i][j];
        const Result z = apart(x, y);
        for (const Numbers& column : {x, y}) {
            const auto ends = std::minmax_element(column.begin(), column.end());
            if (*ends.second > *ends.first) flattest = std::max(flattest, *ends.second / (*ends.second - *ends.first));
        }
        value += z.value / double(a.cols);
        for (size_t i = 0; i < B; ++i) slope[i][j] += z.grad[i] / double(a.cols);
    }
    const double eps = a.dtype == KDLAB_F64 ? 1e-9 : 2e-5, rounding = a.dtype == KDLAB_BF16 ? 4e-3 : 0;
    if (!(std::fabs(out.get(0) - a.factor * value) <= eps * a.factor)) fail(isa, "DIST", a.dtype, a.rows, a.cols, out.get(0), a.factor * value);
    double top = 0;
    for (size_t i = 0; i < B; ++i) {
        const double along = dot(p[i], slope[i]);
        for (int64_t j = 0; j < a.cols; ++j) {
            slope[i][j] = a.factor / a.T * p[i][j] * (slope[i][j] - along);
            top = std::max(top, std::fabs(slope[i][j]));
        }
    }
    for (int64_t i = 0, k = 0; i < a.rows; ++i) {
        for (int64_t j = 0; j < a.cols; ++j) {
            const double got = grad.get(i * a.cols + j), want = mask[i] ? slope[k][j] : 0;
            if (!(std::fabs(got - want) <= eps * (1 + flattest / 100) * top + rounding * std::fabs(want))) fail(isa, "slope of DIST", a.dtype, i, j, got, want);
        }
        k += mask[i];
    }
}

}  // namespace

int main(int argc, char** argv) {
    return fuzz(argc, argv, [](Random& r, const char* isa) {
        if (chance(r, .5)) one_of_features(r, isa);
        else if (chance(r, .3)) one_of_angles(r, isa);
        else if (chance(r, .4)) one_of_grams(r, isa);
        else one_of_dist(r, isa);
    });
}
