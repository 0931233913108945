// Decoupled distillation: the label or not, a question with two answers, beside the KL among the other classes; the
// twin of cpu/decoupled.h, for the device and for the host. The loops around it are in decoupled.cu.
//
// With y the label and O = sum of e over the other classes, the log-odds of the label are l = log(e_y / O). With p and
// q their sigmoids for teacher and student, D = l_s - l_t, and p^ and q^ the probabilities of the others among
// themselves:
//
//     TCKD = KL(p, 1-p || q, 1-q),     d TCKD / d s_y = (q - p) / T,   d TCKD / d s_i = -(q - p) q^_i / T
//     NCKD = KL(p^ || q^),             d NCKD / d s_y = 0,             d NCKD / d s_i = (q^_i - p^_i) / T
//
// NCKD is the forward KL of a row without its label. TCKD has one number a row, in double.
//
// NKD takes the soft cross-entropy of the row without its label, and the label's own cross-entropy, both at T = 1,
// weighted by the teacher's probability of it: half of it is CE with a weight for each row.
#pragma once
#include "softened.h"

namespace kdlab {

struct Coin { double value, slope; };                       // TCKD and q - p

// log(1 + e^x)
KDLAB_BOTH double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-size_of(x))); }

// From log-odds and their difference, which may have digits that they lack
KDLAB_BOTH Coin toss(double l_s, double l_t, double D) {
    constexpr double infinity = Real<double>::infinity, nan = Real<double>::nan;
    if (!(l_s < infinity) || !(l_t < infinity)) return {nan, nan};
    const bool flip = l_t > 0;                              // what follows is about the teacher's less likely answer
    const double sign = flip ? -1 : 1, e_t = exp(-size_of(l_t)), p = e_t / (1 + e_t), rest = 1 / (1 + e_t);
    if (l_s == -infinity) return l_t == -infinity ? Coin{0, 0} : Coin{infinity, flip ? -rest : -p};
    const double e_s = exp(-size_of(l_s)), q = (sign * l_s > 0 ? 1 : e_s) / (1 + e_s);
    if (l_t == -infinity) return {softplus(l_s), q};
    D *= sign;
    if (size_of(D) >= 0.5) {
        const double above = sign * l_s > 0 ? sign * l_s : 0;
        return {above + log1p(e_s) - log1p(e_t) - p * D, sign * (q - p)};
    }
    const double up = expm1(D), v = -log1p(-rest * up / (1 + up)), w = -log1p(p * up);   // log(q / p), and of the rest
    return {p * psi(v) + rest * psi(w), sign * p * expm1(v)};
}

// The teacher's probability of a label that lies `above` the largest other logit, which their sum is relative to
KDLAB_BOTH double probability_of_label(double above, double others) {
    if (others == 0) return 1;
    return above < Real<double>::infinity ? 1 / (1 + exp(log(others) - above)) : Real<double>::nan;
}

// What one thread has seen of a row without its label; for NKD with the teacher's exponentials at T = 1.
template <class R, bool kNKD>
struct OthersSums : Sums<R> {
    R zh_t = 0;

    KDLAB_BOTH R teachers_zh() const { return zh_t; }

    template <bool kCE>
    KDLAB_BOTH void raise(R new_s, R new_t, const Softening<R>& f) {
        if (kNKD) zh_t *= exp2_of(power_of(this->max_t, new_t, R(log2_of_e)));
        Sums<R>::template raise<kCE>(new_s, new_t, f);
    }
    template <bool kCE>
    KDLAB_BOTH void look(R top_s, R top_t, const Softening<R>& f) {
        if (top_s > this->max_s || top_t > this->max_t)
            raise<kCE>(larger(top_s, this->max_s), larger(top_t, this->max_t), f);
    }

    template <bool kCE, int N>
    KDLAB_BOTH void add(const R (&s)[N], const R (&t)[N], const Softening<R>& f) {
        Sums<R>::template add<kNKD ? KDLAB_SOFT_CROSS_ENTROPY : KDLAB_FORWARD_KL, kCE>(s, t, -1, f);
        if (!kNKD) return;
        KDLAB_UNROLL
        for (int i = 0; i < N; ++i) zh_t += exp2_of(power_of(t[i], this->max_t, R(log2_of_e)));
    }
};

}  // namespace kdlab
