// The square of s - t summed over classes, centred or not; for the device and for the host. The loops are in
// squares.cu.
//
// With m the mean of s - t over the row, or 0, the value is the sum of y^2 with y = s - t - m, and its gradient 2 y.
// Differences are exact, and those that the mean is taken of are relative to one of the row's own: so an offset of all
// logits costs no digits.
//
// A class that both exclude (-inf) is not there. One that one side excludes makes the value +inf, and has no part in m.
#pragma once
#include "softened.h"

namespace kdlab {

// high + low
template <class R>
struct Shift {
    R high, low;
    KDLAB_BOTH explicit Shift(double x)
        : high(R(x)), low(size_of(high) < Real<R>::infinity ? R(x - double(high)) : 0) {}
};

// s - t - shift, where not both are -inf
template <class R>
KDLAB_BOTH R shifted(R s, R t, const Shift<R>& by) {
    const Difference<R> d(s, t);
    const R y = d.difference - by.high;
    return size_of(d.difference) < Real<R>::infinity ? y + (d.error - by.low) : y;
}

enum class Excluded { by_none, by_one, by_both };
template <class R>
KDLAB_BOTH Excluded excluded(R s, R t) {
    const bool no_s = s == -Real<R>::infinity, no_t = t == -Real<R>::infinity;
    return no_s && no_t ? Excluded::by_both : no_s || no_t ? Excluded::by_one : Excluded::by_none;
}

// What one thread has seen of a row; and for the cross-entropy the largest logit and the sum relative to it
template <class R>
struct SquareSums {
    R sum = 0;                          // of s - t - `from`
    R apart = 0;                        // of what classes have that one side excludes: infinite
    R absent = 0;                       // how many classes both exclude
    R max_s = Real<R>::lowest, zh = 0;

    KDLAB_BOTH void raise(R new_s) {
        zh *= exp2_of(power_of(max_s, new_s, R(log2_of_e)));
        max_s = new_s;
    }

    template <bool kCE, int N>
    KDLAB_BOTH void add(const R (&s)[N], const R (&t)[N], int label, const Shift<R>& from) {
        KDLAB_UNROLL
        for (int i = 0; i < N; ++i) {
            const R y = shifted(s[i], t[i], from);
            if (size_of(y) < Real<R>::infinity) sum += y;
            else if (excluded(s[i], t[i]) == Excluded::by_both) absent += 1;
            else if (excluded(s[i], t[i]) == Excluded::by_one) apart += s[i] - t[i];
            else sum += y;
        }
        if (!kCE) return;
        KDLAB_UNROLL
        for (int i = 0; i < N; ++i)
            if (i != label) zh += exp2_of(power_of(s[i], max_s, R(log2_of_e)));
    }
};

}  // namespace kdlab
