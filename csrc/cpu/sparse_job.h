// What the kernels of sparse teachers share: one call, with what follows from its arguments worked out once.
#pragma once
#include "../kdlab_sparse.h"
#include "rows.h"

namespace kdlab {

struct SparseJob : kdlab_sparse {
    bool stream;            // the gradient outgrows the cache: write it past the cache
    double denominator;     // of the mean, else 1
    double* values;         // [rows]: weighted value of each row
    char* bad;              // [rows]: rows that cannot be

    bool counts(int64_t r) const { return !mask || mask[r]; }

    // d(out) / d(value of row r before its weight), times the incoming gradient
    double grad_scale(int64_t r) const {
        double g = grad_in ? at(grad_in, loss_dtype, reduction == KDLAB_NONE ? r : 0) : 1.0;
        if (row_weight) g *= at(row_weight, loss_dtype, r);
        return g / denominator;
    }

    void write_row(int64_t r, double value) const {
        values[r] = factor * value * (row_weight ? at(row_weight, loss_dtype, r) : 1.0);
    }

    // Scratch: a row of the student, and six numbers for each kept class; whole vectors, with room behind the end
    int64_t room() const { return (cols + 15) / 16 * 16; }
    int64_t kept_room() const { return (k + 15) / 16 * 16; }
    size_t scratch_bytes() const { return sizeof(double) * (room() + 6 * kept_room()); }
};

}  // namespace kdlab
