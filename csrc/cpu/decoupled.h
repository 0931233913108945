// Decoupled distillation: the label or not, a question with two answers, beside the KL among the other classes. Included
// once per instruction set.
//
// With y the label and O = sum of e over the other classes, the log-odds of the label are l = log(e_y / O). With p and q
// their sigmoids for teacher and student, D = l_s - l_t, and p^ and q^ the probabilities of the others among themselves:
//
//     TCKD = KL(p, 1-p || q, 1-q),     d TCKD / d s_y = (q - p) / T,   d TCKD / d s_i = -(q - p) q^_i / T
//     NCKD = KL(p^ || q^),             d NCKD / d s_y = 0,             d NCKD / d s_i = (q^_i - p^_i) / T
//
// NCKD is the forward KL of a row without its label. TCKD has one number a row, in double.
//
// NKD takes the soft cross-entropy of the row without its label, and the label's own cross-entropy, both at T = 1, weighted by
// the teacher's probability of it: half of it is CE with a weight for each row.
namespace KDLAB_ISA {

struct Coin { double value, slope; };                       // TCKD and q - p

// log(1 + e^x)
inline double softplus(double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x))); }

// psi(v) = e^v - 1 - v where v is small, to the digits of R
template <class R>
inline double small_psi(double v) {
    constexpr int n = sizeof(R) == 8 ? 17 : 4;
    double p = series<F64>.inverse_factorial[n + 1];
    for (int k = n; k >= 2; --k) p = p * v + series<F64>.inverse_factorial[k];
    return p * v * v;
}

// From log-odds and their difference, which may have digits that they lack
template <class R>
KDLAB_OUT_OF_LINE Coin toss(double l_s, double l_t, double D) {
    constexpr double series_below = sizeof(R) == 8 ? 0.5 : 0.01;
    if (!(l_s < INFINITY) || !(l_t < INFINITY)) return {NAN, NAN};
    const bool flip = l_t > 0;                              // what follows is about the teacher's less likely answer
    const double sign = flip ? -1 : 1, e_t = std::exp(-std::fabs(l_t)), p = e_t / (1 + e_t), rest = 1 / (1 + e_t);
    if (l_s == -INFINITY) return l_t == -INFINITY ? Coin{0, 0} : Coin{INFINITY, flip ? -rest : -p};
    const double e_s = std::exp(-std::fabs(l_s)), unlikely = e_s / (1 + e_s), likely = 1 / (1 + e_s);
    const double q = sign * l_s > 0 ? likely : unlikely;
    if (l_t == -INFINITY) return {softplus(l_s), q};
    D *= sign;
    if (std::fabs(D) >= series_below) {
        const double above = sign * l_s > 0 ? sign * l_s : 0;
        return {above + std::log1p(e_s) - std::log1p(e_t) - p * D, sign * (q - p)};
    }
    const double up = std::expm1(D), v = -std::log1p(-rest * up / (1 + up)), w = -std::log1p(p * up);    // log(q / p), and of the rest
    return {p * small_psi<R>(v) + rest * small_psi<R>(w), sign * p * std::expm1(v)};
}

// Are the digits of a float32 sum's logarithm too few for alpha TCKD, beside the loss? It depends on D alone: where that is
// small by chance, while classes differ, an error in it is large.
inline bool too_coarse(double l_s, double l_t, double D, double alpha, double slope, double loss) {
    constexpr double slip = 4e-7;                           // of the two logarithms, at most
    const double odds = std::exp(-std::fabs(l_t)), spread = odds / ((1 + odds) * (1 + odds));
    return std::isfinite(l_s) && slip * (std::fabs(slope) + spread * std::fabs(alpha * D)) > 1e-6 * std::fabs(loss);
}

// The same for a row in each lane, from the label's logits, the largest ones of the others, and what the KL of those found
template <class V> struct CoinOf { V value, slope; };

template <class V>
inline CoinOf<V> toss(V s, V t, V max_s, V max_t, const Close<V>& k, const Temperature<V>& T) {
    const V one = all<V>(1), zero = V{}, low = all<V>(-INFINITY);
    const V x_s = careful_exp(min(s, max_s), max(s, max_s), T), x_t = careful_exp(min(t, max_t), max(t, max_t), T);
    const V yes_s = s > max_s ? k.ps : x_s * k.ps, no_s = s > max_s ? x_s : one;     // label and others, up to a factor
    const V yes_t = t > max_t ? k.pt : x_t * k.pt, no_t = t > max_t ? x_t : one;
    const V all_s = yes_s + no_s, all_t = yes_t + no_t;
    const V p = yes_t / all_t, rest = no_t / all_t, q = yes_s / all_s, rest_q = no_s / all_s;
    const V D = k.w(s, t) - k.lambda, up = D + psi(D), back = -D;
    const V v = -logs_of(rest * (back + psi(back))).log1p, w = -logs_of(p * up).log1p;   // log(q / p), and of the rest
    const CoinOf<V> close = {p * psi(v) + rest * psi(w), p * (v + psi(v))};

    // softplus(l_s) - softplus(l_t) - p D, about the teacher's less likely answer
    const V odds = Difference<V>(s, max_s).difference * k.inverse_T + log_of(k.ps), flipped = rest - p;
    const V above = max(zero, flipped < zero ? -odds : odds), least_p = min(p, rest), turned = flipped < zero ? back : D;
    const V e_s = min(yes_s, no_s) / max(yes_s, no_s), e_t = min(yes_t, no_t) / max(yes_t, no_t);
    V far = above + (logs_of(e_s).log1p - logs_of(e_t).log1p) - (least_p > zero ? least_p * turned : zero);
    far = s > low ? far : t > low ? all<V>(INFINITY) : zero;
    const V far_slope = flipped < zero ? rest - rest_q : q - p;
    return {abs(D) < series_range<V> ? close.value : far, abs(D) < series_range<V> ? close.slope : far_slope};
}

}  // namespace KDLAB_ISA
