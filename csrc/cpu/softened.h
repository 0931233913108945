// The equations of the softened divergences and of cross-entropy, for one vector of elements. The loops around them are
// in wide_rows.h (lanes are classes) and narrow_rows.h (lanes are rows). Included once per instruction set.
//
// With a = s - (about max s), b = t - (about max t), e_s = exp(a/T), e_t = exp(b/T), Z = sum e, M = sum e_t (b - a):
//
//     p_s = e_s / Z_s,   p_t = e_t / Z_t,   KL = sum p_t log(p_t / p_s) = M / (T Z_t) + log(Z_s / Z_t),
//     d KL / d s = (p_s - p_t) / T                                                                  (the fast form)
//
// These differences cancel where student and teacher nearly agree. There v = log(p_s / p_t) is taken from the logits
// without rounding error, and with psi(v) = e^v - 1 - v
//
//     KL = sum p_t psi(v),   d KL / d s = p_t (v + psi(v)) / T                                     (the close form)
//
// Every other divergence is a sum over classes of a value too, and with slope = d value / d p_s its gradient is
//
//     d / d s_i = p_s,i (slope_i - sum_j p_s,j slope_j) / T
//
// so the sweep leaves e_s and e_s slope in the scratch, and the gradient is a mixture of the two, as it is one of e_s
// and e_t for the forward KL.
//
// Cross-entropy, always at T = 1: h = exp(a), CE = log(Z_h / h_y), d CE / d s = h / Z_h - [class = y].
namespace KDLAB_ISA {

// exp(x / T) = 2^(x log2(e) / T), and 0 from `floor` down
template <class V>
struct Temperature {
    V k, k_rest, floor;                             // log2(e) / T = k + k_rest
    explicit Temperature(double T) {
        Real<V> scale = Real<V>(log2_of_e / T);
        k = all<V>(scale);
        k_rest = all<V>(Real<V>(log2_of_e / T - scale));
        floor = all<V>(Scalar<V>::exp_floor / scale);
    }
};

template <class V>
inline V softened_exp(V x, const Temperature<V>& T) { return exp2_of(max(T.floor, x), T.k, T.k_rest); }  // NaN passes

// The same for x / T below 3, and NaN or anything above that.
template <bool kFiner = false, class V>
inline V quick_exp(V x, const Temperature<V>& T) {
    if constexpr (has_quick_exp2<V>) return quick_exp2(x, T.k, kFiner);
    else return softened_exp(x, T);
}

// x - y = difference + error, exactly
template <class V>
struct Difference {
    V difference, error;
    Difference(V x, V y) {
        difference = x - y;
        V back = x - difference;
        error = (x - (difference + back)) + (back - y);
    }
};

// exp((x - top) / T) with the digits that the difference is rounded by. Where one class has nearly all the mass, the
// gradient is as large as the others' probabilities, and they must be as good as it.
template <class V>
inline V careful_exp(V x, V top, const Temperature<V>& T) {
    Difference<V> a(x, top);
    V e = softened_exp(a.difference, T);
    return a.difference > T.floor ? fma(e * Real<V>(0.693147180559945309417), a.error * T.k, e) : e;
}

// e_t (b - a), where 0 * -inf = 0. A class that only the student excludes is looked for apart: see excludes_more.
template <class V>
inline V weighted_difference(V et, V b, V a, const Temperature<V>& T) {
    return et * (max(T.floor, b) - max(all<V>(Scalar<V>::lowest), a));
}

template <class V>
struct Factors { V s, t, h; };                      // of e_s, e_t and h in the gradient

template <bool kKL, bool kCE, class V>
inline V fast_gradient(V es, V et, V h, const Factors<V>& f) {
    V g = kKL ? fma(es, f.s, -(et * f.t)) : h * f.h;
    return kKL && kCE ? fma(h, f.h, g) : g;
}

// w = v + lambda = (s - t - c) / T, free of cancellation, for any c; e^lambda = sum p_t e^w = 1 + sum close_mass. And
// KL = sum p_t psi(w) + lambda + 1 - e^lambda.   p_t = pt e_t, p_s = ps e_s, p_t e^w = pw e_s.
template <class V>
struct Close {
    V c, c_error, inverse_T, pt, ps, pw, lambda;

    V w(V s, V t) const {                           // NaN for a class at -inf
        Difference<V> d(s, t);
        return ((d.difference - c) + (d.error - c_error)) * inverse_T;
    }
};

template <class V>
inline V close_mass(V s, V t, V es, V et, const Close<V>& k) {   // p_t (e^w - 1)
    V w = k.w(s, t), pt = et * k.pt;
    return abs(w) < series_range<V> ? pt * (w + psi(w)) : fma(es, k.pw, -pt);
}

template <class V>
struct CloseTerms { V value, gradient; };                        // p_t psi(v) and p_t (e^v - 1) = p_s - p_t

template <class V>
inline CloseTerms<V> close_terms(V s, V t, V es, V et, const Close<V>& k) {
    V pt = et * k.pt, v = k.w(s, t) - k.lambda, p = psi(v), far = fma(es, k.ps, -pt);
    V far_value = far - (pt > all<V>(0) ? pt * v : V{});         // 0 * -inf = 0
    return {abs(v) < series_range<V> ? pt * p : far_value, abs(v) < series_range<V> ? pt * (v + p) : far};
}

// ---- the mixtures in fast form -------------------------------------------------------------------------------------
// Z_s m = of_s e_s + of_t e_t, so that log2(q / m) = a k - log2(Z_s m), where k = log2(e) / T is the very number that the
// exponentials were made with. The skew KL takes Z_t m, so that log2(p / m) = b k - log2(Z_t m): sums of logarithms that cancel
// would leave the rounding errors of the large ones.
template <class V>
struct Mixture { V of_s, of_t, pull, to_teacher; };              // pull = -of_s log2(e), to_teacher = Z_t / Z_s

template <class V>
inline V fast_ratio(V x, V y) {
    if constexpr (has_quick_inverse<V>) return x * quick_inverse(y);
    else return x / y;
}
template <class V>
inline V log2_over(V a, V x, const Temperature<V>& T) {          // a k - log2 x
    if constexpr (has_quick_log2<V>) return quick_log2_below(x, a, T.k);
    else return fma(a, T.k, fma(a, T.k_rest, log_of(x) * Real<V>(-log2_of_e)));
}

// log2(e_s / m) where m is close to of_s e_s, with the digits that m is rounded by. Wants the rounded product that e_s was made of.
template <class V>
inline V log2_part(V a, V es, V et, V m, const Mixture<V>& k, const Temperature<V>& T) {
    const V error = fma(et, k.of_t, fma(es, k.of_s, -m));        // exact where the student's part is the larger one
    return quick_log2_below(m, error, a * T.k, true);
}

// Sums over classes: of e_s times the slope, and of the value's share, e_s log2(q / m) or e_t log2(p / m). JSD has both shares;
// the first is its slope. Where it takes the second from the KL, that is e_t log2(q / m).
template <class V> struct MixedSums { V slope, share; };

// Adds a class, and returns e_s times its slope.
template <int kKind, bool kFromKL, bool kFine, class V>
inline V add_mixed(V a, V b, V es, V et, const Mixture<V>& k, const Temperature<V>& T, MixedSums<V>& sums) {
    const V m = fma(es, k.of_s, fma(et, k.of_t, all<V>(Real<V>(1e-37))));      // where both are 0 it does not matter
    if constexpr (kKind == KDLAB_SKEW_KL) {
        const V slope = es * fast_ratio(et, m);                  // times -(1 - alpha)
        sums.share = fma(et, log2_over(b, m, T), sums.share);
        sums.slope = sums.slope + slope;
        return slope;
    }
    V over;
    if constexpr (kFine) over = log2_part(a, es, et, m, k, T);
    else over = log2_over(a, m, T);
    if (kKind == KDLAB_JSD) sums.share = fma(et, kFromKL ? over : log2_over(b, fma(m, k.to_teacher, all<V>(Real<V>(1e-37))), T), sums.share);
    else sums.share = fma(es, over, sums.share);
    const V slope = es * (kKind == KDLAB_JSD ? over : fma(fast_ratio(es, m), k.pull, over));
    sums.slope = sums.slope + slope;
    return slope;
}

// ---- the rest of the family, careful form --------------------------------------------------------------------------
// With p the teacher's probability, q the student's, v = log(q / p), d = q - p. Each keeps its digits where q is close
// to p, whatever lies between; a class that one side excludes has p or q = 0, and one that both exclude counts nothing.
template <class V> struct Pair { V p, q, v, d, ratio, back, e, e_back; };     // ratio = q/p = 1 + e, back = p/q = 1 + e_back

constexpr int only_cross_entropy = -1;                           // in the place of a divergence
constexpr bool is_mixture(int kind) {
    return kind == KDLAB_JSD || kind == KDLAB_SKEW_KL || kind == KDLAB_SKEW_REVERSE_KL;
}

template <int kKind, class V>
inline Pair<V> compare(V p, V q, V v) {
    const V most = all<V>(Real<V>(1e30)), one = all<V>(1), back = -v;
    Pair<V> x = {p, q, v, q - p, V{}, V{}, V{}, V{}};
    const auto near = abs(v) < series_range<V>;
    const V e = v + psi(v);
    x.d = near ? p * e : x.d;
    if (kKind == KDLAB_JSD || kKind == KDLAB_SKEW_KL) {
        x.ratio = near ? one + e : min(q / p, most);
        x.e = near ? e : x.ratio - one;
    }
    if (kKind == KDLAB_JSD || kKind == KDLAB_SKEW_REVERSE_KL) {
        const V e_back = back + psi(back);
        x.back = near ? one + e_back : min(p / q, most);
        x.e_back = near ? e_back : x.back - one;
    }
    return x;
}

// A class's share of KL(p || p (1 + x)), where the shares add up to it because those of d_mixed = p x add up to nothing.
template <class V>
inline V share_to_mix(V p, V x, const Logs<V>& logs, V d_mixed) {
    return abs(x) < Real<V>(2) ? p * logs.rest : d_mixed - p * logs.log1p;
}

template <class V> struct Share { V value, slope; };             // of a class; the slope is finite where q > 0
template <class V>
struct Mix {                                                     // beta or alpha, and 1 - that with its own digits
    V mix, rest;
    explicit Mix(double x) : mix(all<V>(Real<V>(x))), rest(all<V>(Real<V>(1 - x))) {}
};

// Slopes count up to a constant. This one makes them small where the two are close.
template <int kKind, class V>
inline Share<V> share_of(const Pair<V>& x, const Mix<V>& mixture) {
    const V mix = mixture.mix, rest = mixture.rest, zero = V{};
    if constexpr (kKind == KDLAB_REVERSE_KL) {                   // q psi(-v)
        V back = -x.v, far = (x.q > zero ? x.q * x.v : zero) - x.d;
        return {abs(x.v) < series_range<V> ? x.q * psi(back) : far, x.q > zero ? x.v : zero};
    } else if constexpr (kKind == KDLAB_TOTAL_VARIATION) {
        V one = all<V>(1), half = all<V>(Real<V>(0.5));
        return {abs(x.d) * half, x.d > zero ? zero : x.d < zero ? -one : x.d - half};       // NaN stays
    } else if constexpr (kKind == KDLAB_JSD) {
        V to_p = rest * x.e, to_q = mix * x.e_back;
        Logs<V> p = logs_of(to_p, fma(rest, x.ratio, mix)), q = logs_of(to_q, fma(mix, x.back, rest));
        V value = fma(mix, share_to_mix(x.p, to_p, p, rest * x.d), rest * share_to_mix(x.q, to_q, q, -mix * x.d));
        return {value, -rest * q.log1p};
    } else if constexpr (kKind == KDLAB_SKEW_KL) {
        V to_p = rest * x.e, m = fma(mix, x.p, rest * x.q);
        Logs<V> p = logs_of(to_p, fma(rest, x.ratio, mix));
        return {share_to_mix(x.p, to_p, p, rest * x.d), m > zero ? rest * rest * x.d / m : x.d * zero};          // NaN stays
    } else {
        static_assert(kKind == KDLAB_SKEW_REVERSE_KL, "no other divergence has shares");
        // The slope is -log(m / q) - mix rest d / m, of which mix near 1 leaves next to nothing: so without what cancels.
        V to_q = rest * x.e_back, m = fma(mix, x.q, rest * x.p);
        Logs<V> q = logs_of(to_q, fma(rest, x.back, mix));
        V of_p = m > zero ? rest * x.p / m : x.d * zero, pull = m > zero ? mix * rest * x.d / m : x.d * zero;
        return {share_to_mix(x.q, to_q, q, -rest * x.d), abs(to_q) < Real<V>(0.5) ? q.rest - to_q * of_p : -q.log1p - pull};
    }
}

// And this one where they hardly overlap, so that nearly all of the student's mass has nearly the same slope; only the
// mixtures need it. z is what the teacher adds to the student's part of the mixture, in units of that.
template <int kKind, class V>
inline V slope_apart(const Pair<V>& x, const Mix<V>& mixture) {
    const V mix = mixture.mix, rest = mixture.rest, one = all<V>(1);
    const V of_s = kKind == KDLAB_SKEW_REVERSE_KL ? mix : rest, of_t = kKind == KDLAB_SKEW_REVERSE_KL ? rest : mix;
    const V z = min(of_t * x.p / (of_s * x.q), all<V>(Real<V>(1e30)));
    if (kKind == KDLAB_JSD) return -rest * logs_of(z).log1p;
    if (kKind == KDLAB_SKEW_KL) return -(rest / mix) * (z / (one + z));
    const Logs<V> logs = logs_of(z);
    const V part = z / (one + z);
    return z < one ? logs.rest - z * part : part - logs.log1p;
}

}  // namespace KDLAB_ISA
