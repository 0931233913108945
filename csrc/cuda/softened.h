// The equations of the divergences between softened distributions, for one element or a few of one thread: the twin of
// cpu/softened.h. It compiles for the device and for the host, where tests check it against float64. The loops around
// it, and the sums over threads, are in rows.h and rows.cu.
//
// With a = s - max s, b = t - max t, e_s = exp(a/T), e_t = exp(b/T), Z = sum e: q = e_s / Z_s is the student, p = e_t /
// Z_t the teacher, v = log(q / p) = (a - b)/T - lambda, lambda = log(Z_s / Z_t), d = q - p. Every divergence is a sum
// over classes of a value, and with psi = d value / d q its gradient is
//
//     d / d s_i = q_i (psi_i - sum_j q_j psi_j) / T
//
// Ordinary rows take v and d as they stand (kClose = false). Where student and teacher nearly agree these differences
// cancel: there v comes from the logits without rounding error, and what is small from series (kClose = true).
#pragma once
#include "../kdlab.h"
#include "device.h"

namespace kdlab {

constexpr double log2_of_e = 1.44269504088896340736, log_of_2 = 0.693147180559945309417;
constexpr int only_cross_entropy = -1;      // in the place of a divergence

template <class R> struct Real;
template <> struct Real<float> {
    static constexpr float lowest = -3.402823466e38f, infinity = __builtin_inff(), nan = __builtin_nanf("");
    static constexpr int psi_terms = 8;
};
template <> struct Real<double> {
    static constexpr double lowest = -1.7976931348623157e308, infinity = __builtin_inf(), nan = __builtin_nan("");
    static constexpr int psi_terms = 17;
};

KDLAB_BOTH float larger(float x, float y) { return fmaxf(x, y); }                       // the other where one is NaN
KDLAB_BOTH double larger(double x, double y) { return fmax(x, y); }
template <class R> KDLAB_BOTH R size_of(R x) { return x < 0 ? -x : x; }

// ---- sums over a row, in one sweep ---------------------------------------------------------------------------------
// The power of 2 that exp((x - top) / T) is; exactly 0 at the top
template <class R>
KDLAB_BOTH R power_of(R x, R top, R k) { return (x - top) * k; }

template <class R>
struct Softening {
    R k, k_rest, inverse_T;             // log2(e) / T = k + k_rest, 1 / T
    int kind;
    KDLAB_BOTH Softening(double T, int which)
        : k(R(log2_of_e / T)), k_rest(R(log2_of_e / T - double(k))), inverse_T(R(1 / T)), kind(which) {}
    KDLAB_BOTH bool reverse() const { return kind == KDLAB_REVERSE_KL; }
    // Is the value +inf where one side alone excludes a class?
    KDLAB_BOTH bool unbounded() const {
        return kind == KDLAB_FORWARD_KL || kind == KDLAB_REVERSE_KL || kind == KDLAB_SOFT_CROSS_ENTROPY;
    }
};

// What one thread has seen of a row: largest logits, and sums relative to these. A class at -inf
// leaves m and the entropy without a number: see Careful.
template <class R>
struct Sums {
    R max_s = Real<R>::lowest, max_t = Real<R>::lowest;
    R zs = 0, zt = 0;
    R m = 0;                            // sum of e_t log2(e_t / e_s), or of e_s log2(e_t / e_s) for the reverse KL
    R entropy = 0;                      // sum of e_t log2 e_t, for the soft cross-entropy
    R zh = 0;                           // sum of exp(s) over all classes but the label

    KDLAB_BOTH R teachers_zh() const { return 0; }
    // To new maxima, none of them smaller
    template <bool kCE>
    KDLAB_BOTH void raise(R new_s, R new_t, const Softening<R>& f) {
        const R by_s = power_of(max_s, new_s, f.k), by_t = power_of(max_t, new_t, f.k);
        const R fs = exp2_of(by_s), ft = exp2_of(by_t), z = f.reverse() ? zs : zt;
        m = z > 0 ? (f.reverse() ? fs : ft) * fused(z, by_t - by_s, m) : 0;
        entropy = zt > 0 ? ft * fused(zt, by_t, entropy) : 0;
        zs *= fs;
        zt *= ft;
        if (kCE) zh *= exp2_of(power_of(max_s, new_s, R(log2_of_e)));
        max_s = new_s;
        max_t = new_t;
    }
    template <bool kCE>
    KDLAB_BOTH void look(R top_s, R top_t, const Softening<R>& f) {
        if (top_s > max_s || top_t > max_t) raise<kCE>(larger(top_s, max_s), larger(top_t, max_t), f);
    }

    // N classes below these maxima; `label` is the place of the label among them, or none of these places. kSweep: a
    // divergence that has these sums.
    template <int kSweep, bool kCE, int N>
    KDLAB_BOTH void add(const R (&s)[N], const R (&t)[N], int label, const Softening<R>& f) {
        KDLAB_UNROLL
        for (int i = 0; i < N; ++i) {
            if (kSweep != only_cross_entropy) {
                const R a = power_of(s[i], max_s, f.k), b = power_of(t[i], max_t, f.k);
                const R es = exp2_of(a), et = exp2_of(b);
                zs += es;
                zt += et;
                m = fused(kSweep == KDLAB_REVERSE_KL ? es : et, b - a, m);
                if (kSweep == KDLAB_SOFT_CROSS_ENTROPY) entropy = fused(et, b, entropy);
            }
            if (kCE && i != label) zh += exp2_of(power_of(s[i], max_s, R(log2_of_e)));
        }
    }
};

// m and the entropy once more, one class at a time: where 0 * -inf = 0
template <class R>
struct Careful {
    R m = 0, entropy = 0;
    bool excludes = false;              // is a class at -inf where the KL becomes +inf?

    KDLAB_BOTH void add(R s, R t, const Sums<R>& sums, const Softening<R>& f) {
        const R a = power_of(s, sums.max_s, f.k), b = power_of(t, sums.max_t, f.k), es = exp2_of(a), et = exp2_of(b);
        const R out = f.reverse() ? t : s, in = f.reverse() ? s : t, weight = f.reverse() ? es : et;
        if (out == -Real<R>::infinity) excludes |= in > -Real<R>::infinity;     // apart from m, which stays finite
        else if (weight > 0) m = fused(weight, b - a, m);
        if (et > 0) entropy = fused(et, b, entropy);
    }
};

// ---- one class -----------------------------------------------------------------------------------------------------
// x - y = difference + error, exactly
template <class R>
struct Difference {
    R difference, error;
    KDLAB_BOTH Difference(R x, R y) {
        difference = x - y;
        R back = x - difference;
        error = (x - (difference + back)) + (back - y);
    }
};

// psi(v) = e^v - 1 - v, for |v| <= series_range: v^2 (1/2! + v/3! + v^2/4! + ...)
template <class R> KDLAB_BOTH constexpr R series_range() { return R(0.75); }

template <class R>
KDLAB_BOTH R psi(R v) {
    constexpr int n = Real<R>::psi_terms;
    constexpr double c[] = {1.0, 1.0, 0.5, 1.6666666666666666e-1, 4.1666666666666664e-2, 8.3333333333333332e-3,
                            1.3888888888888889e-3, 1.9841269841269841e-4, 2.4801587301587302e-5, 2.7557319223985893e-6,
                            2.7557319223985888e-7, 2.5052108385441720e-8, 2.0876756987868100e-9, 1.6059043836821613e-10,
                            1.1470745597729725e-11, 7.6471637318198164e-13, 4.7794773323873853e-14,
                            2.8114572543455206e-15, 1.5619206968586225e-16};
    R x = R(c[n + 1]);
    KDLAB_UNROLL
    for (int k = n; k >= 2; --k) x = fused(x, v, R(c[k]));
    return x * v * v;
}

// log(1 + u) and u - log(1 + u), for -0.6 < u < 1.2: log(1 + u) = 2 (r + r^3/3 + r^5/5 + ...), r = u / (2 + u)
template <class R>
KDLAB_BOTH R log_series(R r2) {
    constexpr int n = sizeof(R) == 8 ? 20 : 8;
    R x = R(1.0 / (2 * n + 1));
    KDLAB_UNROLL
    for (int k = n - 1; k >= 1; --k) x = fused(x, r2, R(1.0 / (2 * k + 1)));
    return x * r2;                                                      // r^2/3 + r^4/5 + ...
}
template <class R>
KDLAB_BOTH R small_log1p(R u) {
    const R r = ratio(u, 2 + u);
    return 2 * fused(r, log_series(r * r), r);
}
template <class R>
KDLAB_BOTH R u_minus_log1p(R u) {
    const R r = ratio(u, 2 + u);
    return r * (u - 2 * log_series(r * r));
}

template <class R>
struct Mix {                            // beta or alpha, and 1 - that with digits of its own
    R mix, rest;
    KDLAB_BOTH explicit Mix(double x) : mix(R(x)), rest(R(1 - x)) {}
};

// Numbers of a row, the same in all its threads. kExact: exponentials keep the digits that rounding takes from their
// argument. Where one class has nearly all the mass, the gradient is as large as the others' probabilities, and they
// must be as good as it. (Inputs of 16 bits do without; and so does double precision, whose rounding nobody sees.)
template <class R, bool kExact>
struct Row {
    R k, k_rest, inverse_T, max_s, max_t;
    R ps, pt;                           // 1 / Z_s, 1 / Z_t
    R lambda;
    R c, c_error;                       // max s - max t, and its rounding error
    Mix<R> mix;

    KDLAB_BOTH Row(R maximum_s, R maximum_t, R zs, R zt, const Softening<R>& f, double mixture)
        : k(f.k), k_rest(f.k_rest), inverse_T(f.inverse_T), max_s(maximum_s), max_t(maximum_t), ps(1 / zs), pt(1 / zt),
          mix(mixture) {
        const Difference<R> maxima(max_s, max_t);
        lambda = log(zs * pt);
        c = maxima.difference;
        c_error = maxima.error;
    }

    // exp((x - top) / T)
    KDLAB_BOTH R exp(R x, R top) const {
        const Difference<R> a(x, top);
        const R y = a.difference * k, e = exp2_of(y);
        if (!kExact) return e;
        const R rest = fused(a.error, k, fused(a.difference, k_rest, fused(a.difference, k, -y)));
        return e > 0 ? fused(e * R(log_of_2), rest, e) : e;
    }

    // w = v + lambda. A class that one side excludes is infinitely far, one that both exclude not at all.
    KDLAB_BOTH R distance(R s, R t) const {
        const Difference<R> x(s, t);
        if (size_of(x.difference) < Real<R>::infinity)
            return ((x.difference - c) + (x.error - c_error)) * inverse_T;
        return s == t ? lambda : x.difference;
    }

    // p (e^w - 1); its sum is e^lambda - 1
    KDLAB_BOTH R mass(R s, R t) const {
        const R es = exp(s, max_s), et = exp(t, max_t), w = distance(s, t);
        return pt * (size_of(w) < series_range<R>() ? et * (w + psi(w)) : es - et);
    }
};

template <class R> struct Pair { R p, q, v, d; };

template <bool kClose, class R, bool kExact>
KDLAB_BOTH Pair<R> compare(R s, R t, const Row<R, kExact>& row) {
    Pair<R> x;
    x.q = row.exp(s, row.max_s) * row.ps;
    x.p = row.exp(t, row.max_t) * row.pt;
    x.d = x.q - x.p;
    if (kClose) {
        x.v = row.distance(s, t) - row.lambda;
        if (size_of(x.v) < series_range<R>()) x.d = x.p * (x.v + psi(x.v));
    } else {
        x.v = ((s - row.max_s) - (t - row.max_t)) * row.inverse_T - row.lambda;
    }
    return x;
}

// m / p - 1 for m = a p + (1-a) q, which is small where 1 - a or q / p - 1 is. v = log(q / p).
template <bool kClose, class R>
KDLAB_BOTH R beyond(R p, R q, R v, R rest) {
    return rest * (kClose && size_of(v) < series_range<R>() ? v + psi(v) : ratio(q, p) - 1);
}
// Do values and slopes need more digits than the logarithm of m / p has?
template <bool kClose, class R>
KDLAB_BOTH bool is_fine(R rest, R x) { return (kClose || rest < R(0.4)) && size_of(x) < R(0.5); }

// A class's share of KL(p || m), m = a p + (1-a) q; the shares differ from p log(p / m) by (1-a) d, which sums to nothing.
template <bool kClose, class R>
KDLAB_BOTH R share_to_mix(R p, R q, R v, R d, R a, R rest) {
    const R x = beyond<kClose>(p, q, v, rest);
    if (is_fine<kClose>(rest, x)) return p * u_minus_log1p(x);
    return fused(rest, d, p > 0 ? p * log(ratio(p, fused(a, p, rest * q))) : 0);
}

// log(p / m), for p > 0
template <bool kClose, class R>
KDLAB_BOTH R log_over_mix(R p, R q, R v, R a, R rest) {
    const R x = beyond<kClose>(p, q, v, rest);
    if (is_fine<kClose>(rest, x)) return -small_log1p(x);
    return log(ratio(p, fused(a, p, rest * q)));
}

// The slope of the skew reverse KL, log(q / m) - alpha (q - m) / m with m = alpha q + (1-alpha) p: without what cancels where
// alpha is near 1
template <bool kClose, class R>
KDLAB_BOTH R slope_to_mix(const Pair<R>& x, R a, R rest) {
    const R m = fused(a, x.q, rest * x.p), more = beyond<kClose>(x.q, x.p, -x.v, rest);
    if (is_fine<kClose>(rest, more)) return u_minus_log1p(more) - more * ratio(rest * x.p, m);
    return log(ratio(x.q, m)) - a * rest * ratio(x.d, m);
}

// A class's share of the divergence
template <int kKind, bool kClose, class R>
KDLAB_BOTH R value_of(const Pair<R>& x, const Mix<R>& both) {
    const R mix = both.mix, rest = both.rest;
    switch (kKind) {
        case KDLAB_REVERSE_KL:                                          // q psi(-v)
            if (kClose && size_of(x.v) < series_range<R>()) return x.q * psi(-x.v);
            return (x.q > 0 ? x.q * x.v : 0) - x.d;
        case KDLAB_JSD:
            return fused(mix, share_to_mix<kClose>(x.p, x.q, x.v, x.d, mix, rest),
                         rest * share_to_mix<kClose>(x.q, x.p, -x.v, -x.d, rest, mix));
        case KDLAB_SKEW_KL: return share_to_mix<kClose>(x.p, x.q, x.v, x.d, mix, rest);
        case KDLAB_SKEW_REVERSE_KL: return share_to_mix<kClose>(x.q, x.p, -x.v, -x.d, mix, rest);
        case KDLAB_TOTAL_VARIATION: return size_of(x.d) / 2;
        default:                                                        // forward KL: p psi(v)
            if (kClose && size_of(x.v) < series_range<R>()) return x.p * psi(x.v);
            return x.d - (x.p > 0 ? x.p * x.v : 0);
    }
}

// psi = d value / d q, up to what is the same for every class; finite where q > 0
template <int kKind, bool kClose, class R>
KDLAB_BOTH R slope_of(const Pair<R>& x, const Mix<R>& both) {
    const R mix = both.mix, rest = both.rest;
    switch (kKind) {
        case KDLAB_REVERSE_KL: return x.v;                              // log(q / p)
        case KDLAB_JSD: return rest * log_over_mix<kClose>(x.q, x.p, -x.v, rest, mix);
        case KDLAB_SKEW_KL:                         // with alpha = 1 it is 0, also where p is
            return rest == 0 ? rest * x.d : rest * rest * ratio(x.d, fused(mix, x.p, rest * x.q));
        case KDLAB_SKEW_REVERSE_KL:                 // with alpha = 1 q / m is 1, and both may underflow
            return rest == 0 ? rest * x.d : slope_to_mix<kClose>(x, mix, rest);
        case KDLAB_TOTAL_VARIATION: return x.d > 0 ? R(0.5) : x.d < 0 ? R(-0.5) : x.d;  // NaN stays
        default: return 0;
    }
}

// Value and slope at once, where they have a logarithm in common: log(p / m) and log(q / m) as they stand, if that is fine enough
template <class R> struct Share { R value, slope; };

template <int kKind, class R>
KDLAB_BOTH Share<R> plain_share_of(const Pair<R>& x, const Mix<R>& both) {
    const R mix = both.mix, rest = both.rest;
    if (kKind == KDLAB_JSD && mix > R(0.25) && rest > R(0.25)) {
        const R m = fused(mix, x.p, rest * x.q), q_over = log(ratio(x.q, m)), p_over = log(ratio(x.p, m));
        const R of_p = x.p > 0 ? mix * x.p * p_over : 0, of_q = x.q > 0 ? rest * x.q * q_over : 0;
        return {of_p + of_q, rest * q_over};
    }
    if (kKind == KDLAB_SKEW_REVERSE_KL && rest > R(0.4)) {
        const R m = fused(mix, x.q, rest * x.p), over = log(ratio(x.q, m)), of_q = x.q > 0 ? x.q * over : 0;
        return {fused(-rest, x.d, of_q), over - mix * rest * ratio(x.d, m)};
    }
    return {value_of<kKind, false>(x, both), slope_of<kKind, false>(x, both)};
}

// q psi, where a class that the student excludes has none. Exact, and summed in double: where one class has most of the
// mass, its psi nearly cancels against the sum.
template <class R>
KDLAB_BOTH double weighted_slope(R q, R slope) { return q == 0 ? 0 : double(q) * double(slope); }

template <class R>
struct Slope {                          // the sum of the weighted slopes, as high + low
    R high, low;
    KDLAB_BOTH explicit Slope(double x) : high(R(x)), low(R(x - double(R(x)))) {}
};

// The gradient of the row's value times T
template <int kKind, bool kClose, class R>
KDLAB_BOTH R gradient_of(const Pair<R>& x, const Slope<R>& slope, const Mix<R>& mix) {
    if (kKind == KDLAB_FORWARD_KL) return x.d;
    return x.q == 0 ? 0 : x.q * ((slope_of<kKind, kClose>(x, mix) - slope.high) - slope.low);
}

// ---- one row -------------------------------------------------------------------------------------------------------
// Is the ordinary form too coarse here? Its error is about 1e-7 of what is subtracted: of the largest probability in
// the gradient; in the value less, the more classes share the mass. The mixtures subtract more. (Double precision
// always takes the other form.)
template <class R>
KDLAB_BOTH bool is_close(R kl, R zs, R zt, bool mixed) {
    const R top_s = 1 / zs, top_t = 1 / zt, top = larger(top_s, top_t);
    if (kl < R(0.03) + R(0.16) * sqrt(top)) return true;
    return mixed ? top > R(0.05) : top > R(0.1) && size_of(top_s - top_t) < R(0.15) * top;
}

// KL from the sums, forward or reverse; their own values, in double
KDLAB_BOTH double kl_of(double m, double zs, double zt, bool reverse) {
    return reverse ? log(zt / zs) - m / zs * log_of_2 : m / zt * log_of_2 + log(zs / zt);
}

// Cross-entropy of a label whose own exponential is h and whose logit lies `below` the largest one
KDLAB_BOTH double cross_entropy_of(double h, double others, double below) {
    return h > others ? log1p(others / h) : log(others + h) + below;
}

}  // namespace kdlab
