// Random shapes, layouts and values through the CPU kernels, against the equations in plain double.
//
//     fuzz [seconds] [seed]
//
// Built with AddressSanitizer and UndefinedBehaviorSanitizer; every buffer has exactly the size it must have, so a
// read or write one element too far is found. The oracle is the definition, one class at a time.
#include "fuzz.h"

namespace {

struct RowResult { double value; std::vector<double> grad; };

// log softmax(x / T); all NaN where it has none
std::vector<double> log_softmax(const std::vector<double>& x, double T) {
    double top = -INFINITY, sum = 0;
    bool bad = false;
    for (double v : x) { bad |= std::isnan(v) || v == INFINITY; top = std::fmax(top, v); }
    std::vector<double> out(x.size(), NAN);
    if (bad || top == -INFINITY) return out;
    for (double v : x) sum += std::exp((v - top) / T);
    for (size_t i = 0; i < x.size(); ++i) out[i] = (x[i] - top) / T - std::log(sum);
    return out;
}

double term(double a, double log_a, double log_b) { return a < 1e-300 ? 0 : a * (log_a - log_b); }  // a mixture underflows sooner

struct SoftResult : RowResult { double unsure; };      // how much of the gradient rounding may decide: total variation

// The soft term of a row, and its gradient: d value / d q_c, then through the softmax to the logits.
SoftResult soft(const std::vector<double>& s, const std::vector<double>& t, double T, int kind, double mix) {
    std::vector<double> lp = log_softmax(t, T), lq = log_softmax(s, T), slope(s.size());
    SoftResult r{{0, std::vector<double>(s.size())}, 0};
    const double of_p = kind == KDLAB_SKEW_REVERSE_KL ? 1 - mix : mix;          // in the mixture
    double mean = 0;
    bool spoilt = false;
    for (size_t i = 0; i < s.size(); ++i) {
        const double p = std::exp(lp[i]), q = std::exp(lq[i]), m = of_p * p + (1 - of_p) * q, log_m = std::log(m);
        if (std::isnan(p + q)) r.value = NAN;
        switch (kind) {
            case KDLAB_REVERSE_KL: r.value += term(q, lq[i], lp[i]); slope[i] = q == 0 ? 0 : lq[i] - lp[i]; break;
            case KDLAB_TOTAL_VARIATION:
                r.value += std::fabs(p - q) / 2;
                slope[i] = q > p ? .5 : q < p ? -.5 : 0;
                if (std::fabs(q - p) <= 1e-5 * (p + q)) r.unsure += q;
                break;
            case KDLAB_JSD:
                r.value += mix * term(p, lp[i], log_m) + (1 - mix) * term(q, lq[i], log_m);
                slope[i] = q < 1e-300 ? 0 : (1 - mix) * (lq[i] - log_m);
                break;
            case KDLAB_SKEW_KL: r.value += term(p, lp[i], log_m); slope[i] = q < 1e-300 || m == 0 ? 0 : -(1 - mix) * p / m; break;
            case KDLAB_SKEW_REVERSE_KL: r.value += term(q, lq[i], log_m); slope[i] = q < 1e-300 ? 0 : lq[i] - log_m - mix * q / m; break;
            case KDLAB_SOFT_CROSS_ENTROPY: r.value -= p == 0 ? 0 : p * lq[i]; break;
            default: r.value += term(p, lp[i], lq[i]);
        }
        const bool student_alone = s[i] == -INFINITY && t[i] > -INFINITY, teacher_alone = t[i] == -INFINITY && s[i] > -INFINITY;
        if ((kind == KDLAB_FORWARD_KL || kind == KDLAB_SOFT_CROSS_ENTROPY) && student_alone) r.value += INFINITY;    // where p underflows too
        if (kind == KDLAB_REVERSE_KL && teacher_alone) { r.value += INFINITY; spoilt = true; }
        mean += q * slope[i];
        r.grad[i] = (q - p) / T;
    }
    if (kind == KDLAB_FORWARD_KL || kind == KDLAB_SOFT_CROSS_ENTROPY) return r;
    for (size_t i = 0; i < s.size(); ++i)
        r.grad[i] = spoilt || std::isnan(r.value) ? NAN : std::exp(lq[i]) * (slope[i] - mean) / T;
    return r;
}

double softplus(double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x))); }
bool none(const std::vector<double>& x) {
    for (double v : x) if (v != -INFINITY) return false;
    return true;
}

// The log-odds of a class against the others
double log_odds(double own, const std::vector<double>& others, double T) {
    double top = -INFINITY, sum = 0;
    for (double v : others) top = std::fmax(top, v);
    for (double v : others) sum += std::exp((v - top) / T);
    return own == INFINITY ? NAN : (own - top) / T - std::log(sum);
}

// DKD of a row, and its gradient
SoftResult decoupled(const std::vector<double>& s, const std::vector<double>& t, double T, double alpha, double beta, int64_t y) {
    std::vector<double> s_others = s, t_others = t;
    s_others.erase(s_others.begin() + y);
    t_others.erase(t_others.begin() + y);
    SoftResult r{{0, std::vector<double>(s.size(), 0.0)}, 0};
    if (none(s_others) && none(t_others)) {
        r.value = std::isfinite(s[y]) && std::isfinite(t[y]) ? 0 : NAN;
        r.grad.assign(s.size(), r.value);
        return r;
    }
    const SoftResult nckd = soft(s_others, t_others, T, KDLAB_FORWARD_KL, 0);
    const double l_s = log_odds(s[y], s_others, T), l_t = log_odds(t[y], t_others, T), p = std::exp(-softplus(-l_t));
    const double slope = std::exp(-softplus(-l_s)) - p;
    double tckd = 0;
    if (l_t > -INFINITY) tckd += p == 0 ? 0 : p * (softplus(-l_s) - softplus(-l_t));
    tckd += std::exp(-softplus(l_t)) * (softplus(l_s) - softplus(l_t));
    if (l_s == -INFINITY && l_t > -INFINITY) tckd = INFINITY;                         // where p underflows too
    r.value = (alpha == 0 ? 0 : alpha * tckd) + (beta == 0 ? 0 : beta * nckd.value) + slope * 0;   // a part of weight 0 is not there
    std::vector<double> lq = log_softmax(s_others, T);
    for (size_t i = 0; i < s_others.size(); ++i)
        r.grad[i + (static_cast<int64_t>(i) >= y)] = beta * nckd.grad[i] - alpha * slope * std::exp(lq[i]) / T;
    r.grad[y] = alpha * slope / T;
    if (std::isnan(tckd + nckd.value)) r.grad.assign(s.size(), NAN);                 // and not where 0 * inf is
    return r;
}

// logit_mse of a row, and its gradient
SoftResult squares(const std::vector<double>& s, const std::vector<double>& t, bool center) {
    SoftResult r{{0, std::vector<double>(s.size(), 0.0)}, 0};
    double n = 0, mean = 0, left = 0;
    auto absent = [&](size_t i) { return s[i] == -INFINITY && t[i] == -INFINITY; };
    auto one_sided = [&](size_t i) { return (s[i] == -INFINITY) != (t[i] == -INFINITY); };
    for (size_t i = 0; i < s.size(); ++i) {
        n += !absent(i);
        if (!absent(i) && !one_sided(i)) mean += s[i] - t[i];
    }
    mean = center && n > 0 ? mean / n : 0;
    for (size_t i = 0; i < s.size(); ++i) {
        const double d = absent(i) ? 0 : s[i] - t[i] - mean;
        r.value += d * d;
        left += d;
        r.grad[i] = 2 * d;
    }
    if (center && !std::isfinite(r.value))
        for (size_t i = 0; i < s.size(); ++i) if (!absent(i) && !one_sided(i)) r.grad[i] -= 2 * left / n;
    return r;
}

// NKD of a row, and its gradient; the label's term has neither T nor its square
SoftResult normalised(const std::vector<double>& s, const std::vector<double>& t, double T, double gamma, int64_t y, double square) {
    SoftResult r = decoupled(s, t, T, 0, 0, y);                                       // NaN where it must be
    std::vector<double> s_others = s, t_others = t;
    s_others.erase(s_others.begin() + y);
    t_others.erase(t_others.begin() + y);
    const double l_s = log_odds(s[y], s_others, 1), p = std::exp(-softplus(-log_odds(t[y], t_others, 1)));
    if (none(s_others) && none(t_others)) return r;
    const SoftResult others = soft(s_others, t_others, T, KDLAB_SOFT_CROSS_ENTROPY, 0);
    std::vector<double> lq = log_softmax(s, 1);
    r.value = (p == 0 ? 0 : p * softplus(-l_s) / square) + gamma * others.value;
    const bool spoilt = std::isnan(p + others.value) || std::isnan(l_s);
    if (s[y] == -INFINITY && t[y] > -INFINITY) r.value = INFINITY;                      // however small p is
    if (spoilt) r.value = NAN;
    for (size_t i = 0; i < s.size(); ++i) {
        const bool own = static_cast<int64_t>(i) == y;
        r.grad[i] = p / square * (own ? -std::exp(-softplus(l_s)) : std::exp(lq[i]));
        if (!own) r.grad[i] += gamma * others.grad[i - (static_cast<int64_t>(i) > y)];
        if (spoilt) r.grad[i] = NAN;
    }
    return r;
}

RowResult hard(const std::vector<double>& s, int64_t y) {
    std::vector<double> lq = log_softmax(s, 1);
    RowResult r{-lq[y], std::vector<double>(s.size())};
    for (size_t i = 0; i < s.size(); ++i) r.grad[i] = std::exp(lq[i]) - (static_cast<int64_t>(i) == y);
    return r;
}

[[noreturn]] void fail(const kdlab_soft_kl& a, const char* isa, const char* what, int64_t row, int64_t col, double got, double want) {
    std::printf("FAILED %s at row %lld col %lld: got %.17g, want %.17g\n  %s dtype %d, %lld x %lld, strides %lld %lld, T %g, "
                "kl %g ce %g, reduction %d, kind %d, mix %g\n", what, (long long)row, (long long)col, got, want, isa, a.dtype,
                (long long)a.rows, (long long)a.cols, (long long)a.student_stride, (long long)a.teacher_stride, a.T,
                a.kl_weight, a.ce_weight, a.reduction, a.kind, a.mix);
    std::exit(1);
}

void once(Random& r, const char* isa) {
    static const int64_t columns[] = {0, 1, 2, 3, 7, 8, 10, 15, 16, 17, 31, 33, 40, 41, 63, 64, 65, 100, 252, 507, 1000, 1271, 2051};
    static const double temperatures[] = {0.05, 0.5, 1, 4, 20, 100};
    kdlab_soft_kl a = {};
    a.dtype = static_cast<int>(pick(r, 4));
    a.loss_dtype = a.dtype == KDLAB_F64 ? KDLAB_F64 : KDLAB_F32;
    a.cols = columns[pick(r, sizeof columns / sizeof *columns)];
    a.rows = pick(r, a.cols > 500 ? 6 : 40);
    a.student_stride = a.cols + (chance(r, .3) ? pick(r, 9) : 0);
    a.teacher_stride = a.cols + (chance(r, .3) ? pick(r, 9) : 0);
    a.T = temperatures[pick(r, 6)];
    a.kl_factor = chance(r, .5) ? a.T * a.T : 1;
    a.kl_weight = chance(r, .2) ? 0 : 0.9;
    a.ce_weight = chance(r, .5) && a.cols ? 0.4 : 0;
    a.reduction = static_cast<int>(pick(r, 3));
    a.normalizer = chance(r, .3) ? 7 : NAN;
    a.ignore_index = -100;
    a.kind = static_cast<int>(pick(r, 10));
    a.mix = chance(r, .1) ? 0 : chance(r, .1) ? 1 : chance(r, .3) ? .5 : std::uniform_real_distribution<>(0, 1)(r);
    a.others = std::uniform_real_distribution<>(0, 3)(r);
    const bool dkd = a.kind == KDLAB_DKD && a.kl_weight != 0, nkd = a.kind == KDLAB_NKD && a.kl_weight != 0;
    const bool mse = a.kind == KDLAB_LOGIT_MSE;
    if (mse) a.T = a.kl_factor = 1, a.mix = chance(r, .5);
    const bool jsd = a.kind == KDLAB_JSD, skew = a.kind == KDLAB_SKEW_KL, skew_reverse = a.kind == KDLAB_SKEW_REVERSE_KL;
    int kind = a.kind;                                 // what it is at the ends
    if ((jsd && a.mix == 0) || (skew && a.mix == 0)) kind = KDLAB_FORWARD_KL;
    if ((jsd && a.mix == 1) || (skew_reverse && a.mix == 0)) kind = KDLAB_REVERSE_KL;

    // Exactly as many elements as the last row needs: a stride beyond it is not there.
    auto elements = [&](int64_t stride) { return a.rows && a.cols ? (a.rows - 1) * stride + a.cols : 0; };
    Array s(a.dtype, elements(a.student_stride)), t(a.dtype, elements(a.teacher_stride));
    const double spread = chance(r, .2) ? 100 : 3, close = chance(r, .3) ? 1e-3 : spread, nasty = chance(r, .3) ? .02 : 0;
    std::normal_distribution<> normal;
    auto value = [&](double x) {
        if (!chance(r, nasty)) return x;
        static const double odd[] = {-INFINITY, -INFINITY, -INFINITY, INFINITY, NAN, 1e4, -1e4, 1e-40};
        return odd[pick(r, 8)];
    };
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < a.cols; ++j) {
            double x = spread * normal(r);
            t.set(i * a.teacher_stride + j, value(x));
            s.set(i * a.student_stride + j, value(x + close * normal(r)));
        }
    std::vector<int64_t> target(a.rows);
    std::unique_ptr<uint8_t[]> mask(new uint8_t[a.rows]);
    for (int64_t i = 0; i < a.rows; ++i) {
        target[i] = chance(r, .2) || !a.cols ? -100 : pick(r, a.cols);
        mask[i] = !chance(r, .2);
    }
    const int64_t outs = a.reduction == KDLAB_NONE ? a.rows : 1;
    Array row_weight(a.loss_dtype, a.rows), grad_in(a.loss_dtype, outs), grad(a.dtype, a.rows * a.cols), again(a.dtype, a.rows * a.cols);
    Array kl(a.loss_dtype, a.rows), ce(a.loss_dtype, a.rows), out(a.loss_dtype, outs), out2(a.loss_dtype, outs);
    for (int64_t i = 0; i < a.rows; ++i) row_weight.set(i, 0.5 + std::fabs(normal(r)));
    for (int64_t i = 0; i < outs; ++i) grad_in.set(i, normal(r));

    const bool weighted = chance(r, .3), scaled = chance(r, .3), masked = chance(r, .4), labelled = a.ce_weight != 0 || dkd || nkd || chance(r, .3);
    a.student = s.bytes.get();
    a.teacher = a.kl_weight != 0 ? t.bytes.get() : nullptr;
    a.target = labelled ? target.data() : nullptr;
    a.mask = masked ? mask.get() : nullptr;
    a.row_weight = weighted ? row_weight.bytes.get() : nullptr;
    a.grad_in = scaled ? grad_in.bytes.get() : nullptr;
    a.grad = grad.bytes.get();
    a.kl_rows = a.kl_weight != 0 ? kl.bytes.get() : nullptr;
    a.ce_rows = a.ce_weight != 0 ? ce.bytes.get() : nullptr;
    a.out = out.bytes.get();
    a.threads = 1;
    if (kdlab_soft_kl_cpu(&a) != -1) fail(a, isa, "labels", 0, 0, 0, 0);
    kdlab_soft_kl b = a;
    b.grad = again.bytes.get();
    b.out = out2.bytes.get();
    b.threads = 2;
    kdlab_soft_kl_cpu(&b);
    if (!out2.equals(out) || !again.equals(grad)) fail(a, isa, "threads", 0, 0, 0, 0);
    if (a.student_stride == a.cols) {                  // the gradient may take the student's place
        Array place(a.dtype, s.count);
        std::memcpy(place.data(), s.data(), s.count * s.size());
        b.student = b.grad = place.data();
        kdlab_soft_kl_cpu(&b);
        if (!out2.equals(out) || !place.equals(grad)) fail(a, isa, "in place", 0, 0, 0, 0);
    }

    int64_t valid = 0;
    auto counts = [&](int64_t i) { return !(masked && !mask[i]) && !(labelled && target[i] == -100); };
    for (int64_t i = 0; i < a.rows; ++i) valid += counts(i);
    double denominator = a.reduction != KDLAB_MEAN ? 1 : std::isnan(a.normalizer) ? std::fmax(1.0, double(valid)) : a.normalizer;
    const double eps = a.dtype == KDLAB_F64 ? 1e-11 : 4e-6;                       // close rows: the definition itself is so coarse
    const double rounding = a.dtype == KDLAB_BF16 ? 4e-3 : a.dtype == KDLAB_F16 ? 5e-4 : 0;
    double total = 0, size = 0;
    for (int64_t i = 0; i < a.rows; ++i) {
        std::vector<double> zs(a.cols), zt(a.cols);
        for (int64_t j = 0; j < a.cols; ++j) zs[j] = s.get(i * a.student_stride + j), zt[j] = t.get(i * a.teacher_stride + j);
        SoftResult k{{0, std::vector<double>(a.cols)}, 0};
        RowResult c = k;
        const bool count = counts(i);
        if (count && a.cols && dkd) k = decoupled(zs, zt, a.T, a.mix, a.others, target[i]);
        else if (count && a.cols && nkd) k = normalised(zs, zt, a.T, a.others, target[i], a.kl_factor);
        else if (count && a.cols && mse && a.kl_weight != 0) k = squares(zs, zt, a.mix != 0);
        else if (count && a.cols && a.kl_weight != 0) k = soft(zs, zt, a.T, kind, a.mix);
        if (count && a.cols && a.ce_weight != 0) c = hard(zs, target[i]);
        double w = weighted ? row_weight.get(i) : 1, v = 0, far = 1 / a.T;
        if (a.kl_weight != 0) v += a.kl_weight * a.kl_factor * k.value;
        if (a.ce_weight != 0) v += a.ce_weight * c.value;
        for (double z : zs) if (std::isfinite(z)) far = std::fmax(far, std::fabs(z) / a.T);
        for (double z : zt) if (std::isfinite(z)) far = std::fmax(far, std::fabs(z) / a.T);
        double parts = dkd ? a.mix + a.others : nkd ? a.others + 1 / a.kl_factor : 1, steepest = 0;
        for (double z : k.grad) if (mse && std::isfinite(z)) steepest = std::fmax(steepest, std::fabs(z));
        if (mse && std::isfinite(k.value)) parts = k.value;
        const double slack = eps * w * (a.kl_factor * parts * (1 + far) + 1 + far * a.T);
        total += w * v;
        size += slack;
        if (a.reduction == KDLAB_NONE && !same(out.get(i), w * v, slack)) fail(a, isa, "row", i, 0, out.get(i), w * v);
        double g = (scaled ? grad_in.get(a.reduction == KDLAB_NONE ? i : 0) : 1) * (count ? w : 0) / denominator;
        const double steep = kind == KDLAB_FORWARD_KL || kind == KDLAB_SOFT_CROSS_ENTROPY ? 1 : dkd ? parts : nkd ? parts * std::fmax(1, a.T) : mse ? steepest : 1 + far;
        const double limit = std::fabs(g) * (a.kl_weight * a.kl_factor / a.T * steep + a.ce_weight);
        const double unsure = std::fabs(g) * a.kl_weight * a.kl_factor / a.T * 2 * k.unsure;
        for (int64_t j = 0; j < a.cols; ++j) {
            double want = count ? g * (a.kl_weight * a.kl_factor * k.grad[j] + a.ce_weight * c.grad[j]) : 0;
            if (a.kl_weight == 0) want = count ? g * a.ce_weight * c.grad[j] : 0;
            if (a.dtype == KDLAB_F16 && !(std::fabs(want) < 6e4)) continue;       // overflows as it must
            if (!same(grad.get(i * a.cols + j), want, eps * limit + unsure + rounding * std::fabs(want) + (a.dtype == KDLAB_F16 ? 1e-7 : 1e-37)))
                fail(a, isa, "gradient", i, j, grad.get(i * a.cols + j), want);
        }
    }
    if (a.reduction != KDLAB_NONE && !same(out.get(0), total / denominator, (size + 1e-7 * std::fabs(total)) / denominator))
        fail(a, isa, "sum", 0, 0, out.get(0), total / denominator);
}

}  // namespace

int main(int argc, char** argv) { return fuzz(argc, argv, once); }
