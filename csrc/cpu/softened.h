// The equations of the softened forward KL and of cross-entropy, for one vector of elements. The loops around them are
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
template <class V>
inline V quick_exp(V x, const Temperature<V>& T) {
    if constexpr (has_quick_exp2<V>) return quick_exp2(x, T.k);
    else return softened_exp(x, T);
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

}  // namespace KDLAB_ISA
