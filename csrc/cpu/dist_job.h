// What the kernels of DIST share: correlations from moments, and one call.
#pragma once
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace kdlab {

// Sums over n pairs of q (teacher) and d = p - q, and of their products
struct PairSums { double q, d, qq, qd, dd, pp; };

// 1 - Pearson correlation of p and q. With a, e and b = a + e for q, d and p about their means,
//
//     k = (|b| - |a|) / |a|,   1 - rho = (|e|^2 - (|b| - |a|)^2) / (2 |a| |b|),
//     d (1 - rho) / d b = (e - k a - (1 - rho) b) / |b|^2 = own * e + other * a
struct Pearson {
    double apart = 0, own = 0, other = 0, length = 0;
    Pearson() {}
    // The sums may be of q - mean and p - mean.
    Pearson(const PairSums& x, double n, double mean = 0) {
        const double noise = 1e-13;                             // of the second moments: what rounding leaves of nothing
        const double aa = x.qq - x.q * x.q / n, ea = x.qd - x.q * x.d / n, ee = x.dd - x.d * x.d / n;
        const double p = x.q + x.d, bb = x.pp - p * p / n;
        apart = 1 + 0 * (aa + bb);
        const double all = n * mean * mean;
        const double of_q = noise * (x.qq + 2 * mean * x.q + all), of_p = noise * (x.pp + 2 * mean * p + all);
        if (!(aa > of_q && bb > of_p)) return;                  // constant (or NaN): no slope
        const double a = std::sqrt(aa), b = std::sqrt(bb), longer = (2 * ea + ee) / (a + b);
        apart = std::max(0.0, ee - longer * longer) / (2 * a * b);
        if (n <= 2) return;                                     // two points always lie on a line
        length = b;
        own = (1 - apart) / bb;
        other = -(longer / a + apart) / bb;
    }
};

// A row's softmax, p = over_s exp((s - top_s) / T), and what makes p - q exact where both nearly agree: see dist.h.
struct DistRow {
    double top_s, top_t, over_s, over_t;
    bool close;
    double c, mass;
    Pearson pearson;
};

struct DistJob : kdlab_dist {
    DistRow* row_parts;                             // [rows]
    // Of the columns, [9, room] in the precision of the sums: mean of q, own, over; for close rows mean of d, other and
    // rest, for the others mean of p, other - own and rest. With y = d or p the slope is
    // over * (own * (y - mean) + other * (q - mean of q) + rest); rest makes up for the rounding of the means.
    const void* columns;
    bool stream;                                    // the gradient outgrows the cache: write it past the cache
    double row_scale;                               // one over the rows that count
    double scale;                                   // factor times the incoming gradient
    bool counts(int64_t r) const { return !mask || mask[r]; }
    int64_t room() const { return (cols + 15) / 16 * 16; }      // whole vectors
    int64_t together() const { return std::max<int64_t>(1, std::min<int64_t>(8, 16384 / (room() + 1))); }  // in the cache
    size_t scratch_bytes() const { return sizeof(double) * (2 * together() * room() + 8); }
};

}  // namespace kdlab
