// The functions that the losses are made of, for vectors of any instruction set. Included once per instruction set.
namespace KDLAB_ISA {

// What the kernels need to know about a vector type
template <class V> struct Scalar;
template <> struct Scalar<F32> {
    typedef float Real;
    typedef I32 Int;
    static constexpr int lanes = sizeof(F32) / sizeof(float);
    static constexpr int mantissa = 23;
    static constexpr float rounder = 12582912.0f + 127.0f;  // 1.5 * 2^23 + bias: adding it rounds to whole numbers
    static constexpr float exp_floor = -127;                // 2^x counts as 0 from here down
    static constexpr float lowest = -1e38f;                 // stands for -inf where 0 * -inf must be 0
    static constexpr float least = -3.402823466e38f;        // the finite end
    static constexpr int psi_terms = 8, log_terms = 5;
    static constexpr int32_t sqrt_half = 0x3f3504f3;        // bits of sqrt(1/2)
};
template <> struct Scalar<F64> {
    typedef double Real;
    typedef I64 Int;
    static constexpr int lanes = sizeof(F64) / sizeof(double);
    static constexpr int mantissa = 52;
    static constexpr double rounder = 6755399441055744.0 + 1023.0;      // 1.5 * 2^52 + bias
    static constexpr double exp_floor = -1023;
    static constexpr double lowest = -1e308;
    static constexpr double least = -1.7976931348623157e308;
    static constexpr int psi_terms = 17, log_terms = 11;
    static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd;
};

// The vector that elements of type E are computed in
template <class E> struct VectorOf { typedef F32 type; };
template <> struct VectorOf<double> { typedef F64 type; };
template <class E> using VecOf = typename VectorOf<E>::type;

template <class V> using Real = typename Scalar<V>::Real;
template <class V> constexpr int lanes = Scalar<V>::lanes;
template <class V> inline V all(Real<V> x) { return splat(V{}, x); }

template <class To, class From>
inline To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

constexpr double log2_of_e = 1.44269504088896340736;

// 2^f for |f| <= 1/2, with 2^0 = 1 exactly
inline F32 exp2_near_0(F32 f) {                             // minimax, relative error 2e-9
    F32 p = fma(all<F32>(1.53533619e-4f), f, all<F32>(1.33988744e-3f));
    p = fma(p, f, all<F32>(9.61843736e-3f));
    p = fma(p, f, all<F32>(5.55033247e-2f));
    p = fma(p, f, all<F32>(2.40226479e-1f));
    p = fma(p, f, all<F32>(6.93147203e-1f));
    return fma(p, f, all<F32>(1.0f));
}
inline F64 exp2_near_0(F64 f) {                             // Taylor: ln(2)^k / k!
    const double c[] = {1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477,
                        0.0013333558146428443, 0.0001540353039338161, 1.5252733804059841e-05, 1.3215486790144307e-06,
                        1.01780860092397e-07, 7.054911620801121e-09, 4.445538271870812e-10, 2.5678435993488202e-11,
                        1.3691488853904128e-12};
    F64 p = all<F64>(c[13]);
    for (int k = 12; k >= 0; --k) p = fma(p, f, all<F64>(c[k]));
    return p;
}

// 2^(x k), for x k >= exp_floor. k comes as a sum, and the product loses its whole part before it is rounded: so the
// relative error is about one rounding, however large x k is.
template <class V>
inline V exp2_of(V x, V k, V k_rest) {
    V shifted = fma(x, k, all<V>(Scalar<V>::rounder)), n = shifted - all<V>(Scalar<V>::rounder);
    return exp2_near_0(fma(x, k_rest, fma(x, k, -n))) * power_of_2(shifted);
}

// psi(v) = e^v - 1 - v, for |v| <= series_range: v^2 (1/2! + v/3! + v^2/4! + ...)
template <class V> constexpr Real<V> series_range = Real<V>(0.75);

template <class R>
struct Series {                                             // 1/k! for psi, 2/(2k+1) for the logarithm
    R inverse_factorial[20], odd[20];
    constexpr Series() : inverse_factorial(), odd() {
        double f = 1;
        for (int k = 0; k < 20; ++k) {
            if (k > 1) f /= k;
            inverse_factorial[k] = R(f);
            odd[k] = R(2.0 / (2 * k + 1));
        }
    }
};
template <class V> constexpr Series<Real<V>> series = {};

template <class V>
inline V psi(V v) {
    constexpr int n = Scalar<V>::psi_terms;
    V p = all<V>(series<V>.inverse_factorial[n + 1]);
    for (int k = n; k >= 2; --k) p = fma(p, v, all<V>(series<V>.inverse_factorial[k]));
    return p * v * v;
}

// log x, for normal positive x; NaN and infinity give NaN
template <class V>
inline V log_of(V x) {
    typedef typename Scalar<V>::Int Int;
    Int i = same_bits<Int>(x), e = (i - Scalar<V>::sqrt_half) >> Scalar<V>::mantissa;
    V m = same_bits<V>(i - (e << Scalar<V>::mantissa));     // x = m 2^e with sqrt(1/2) <= m < sqrt(2)
    V s = (m - Real<V>(1)) / (m + Real<V>(1)), s2 = s * s;
    V p = all<V>(series<V>.odd[Scalar<V>::log_terms]);
    for (int k = Scalar<V>::log_terms - 1; k >= 0; --k) p = fma(p, s2, all<V>(series<V>.odd[k]));
    return fma(to_float(e), all<V>(Real<V>(0.693147180559945309417)), p * s) + (x - x);
}

template <class V>
inline V log1p_of(V x) {
    V u = x + Real<V>(1);
    return log_of(u) + (x - (u - Real<V>(1))) / u;
}

// log(1 + x) and x - log(1 + x), each with its digits also where x is small; for x > -1 and below 1e35. NaN gives NaN.
// `above` is 1 + x, with more digits than that has where x is near -1, if the caller knows them.
template <class V> struct Logs { V log1p, rest; };

template <class V>
inline Logs<V> logs_of(V x, V above) {
    typedef typename Scalar<V>::Int Int;
    constexpr int n = Scalar<V>::log_terms;
    const V y = max(above, V{});                                // a lane that is not wanted may hold less: no overflow
    const Int i = same_bits<Int>(y), e = (i - Scalar<V>::sqrt_half) >> Scalar<V>::mantissa;
    const V m = same_bits<V>(i - (e << Scalar<V>::mantissa));   // y = m 2^e with sqrt(1/2) <= m < sqrt(2)
    const V whole = to_float(e), none = V{}, z = whole == none ? x : m - Real<V>(1);
    const V s = z / (z + Real<V>(2)), s2 = s * s;               // log(1 + z) = 2 (s + s^3/3 + s^5/5 + ...)
    V p = all<V>(series<V>.odd[n]);
    for (int k = n - 1; k >= 1; --k) p = fma(p, s2, all<V>(series<V>.odd[k]));
    p = p * s2;
    const V log1p = fma(whole, all<V>(Real<V>(0.693147180559945309417)), s * (p + Real<V>(2))) + (x - x);
    return {log1p, whole == none ? s * (z - p) : x - log1p};
}
template <class V>
inline Logs<V> logs_of(V x) { return logs_of(x, x + Real<V>(1)); }

}  // namespace KDLAB_ISA
