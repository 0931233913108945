// What the kernels of DIST share: correlations from moments, and one call.
#pragma once
#include <cmath>

#include "rows.h"

namespace kdlab {

// Pearson correlation of p and q from n pairs' sums of p, q, p^2, q^2, p q; 1 - rho has the slope own * a + other * b.
struct Pearson {
    double apart = 0, own = 0, other = 0;
    Pearson() {}
    Pearson(double p, double q, double pp, double qq, double pq, double n) {
        const double noise = 1e-13;                             // of the second moments: what rounding leaves of nothing
        const double aa = pp - p * p / n, bb = qq - q * q / n, ab = pq - p * q / n;
        apart = 1 + 0 * (aa + bb);
        if (!(aa > noise * pp && bb > noise * qq)) return;      // constant (or NaN): no slope
        const double length = std::sqrt(aa * bb), rho = ab / length;
        apart = (length - ab) / length;
        own = rho / aa;
        other = -1 / length;
    }
};

struct DistJob : kdlab_dist {
    Pearson* row_parts;                             // [rows]
    const double *mean_p, *mean_q, *own, *other;    // [room]: of the columns, times their scale
    double row_scale;                               // one over the rows that count
    double scale;                                   // factor times the incoming gradient
    bool counts(int64_t r) const { return !mask || mask[r]; }
    int64_t room() const { return (cols + 15) / 16 * 16; }      // whole vectors
};

}  // namespace kdlab
