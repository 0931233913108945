// What the kernels of feature losses share: one call, with what follows from its arguments worked out once.
#pragma once
#include <algorithm>
#include <type_traits>

#include "rows.h"

namespace kdlab {

struct FeatureJob : kdlab_features {
    int64_t student_size, teacher_size;     // elements of a sample
    bool stream;                            // the gradient outgrows the cache: write it past the cache
    double denominator;                     // of the mean, else 1
    double* values;                         // [samples]

    bool counts(int64_t i) const { return !mask || mask[i]; }

    // d(out) / d(value of sample i), times the incoming gradient
    double grad_scale(int64_t i) const {
        return (grad_in ? at(grad_in, loss_dtype, reduction == KDLAB_NONE ? i : 0) : 1.0) / denominator;
    }

    // Attention: pixels of the maps, and of the smaller map that they are compared on
    int64_t student_pixels() const { return student_shape[1] * student_shape[2]; }
    int64_t teacher_pixels() const { return teacher_shape[1] * teacher_shape[2]; }
    int64_t height() const { return std::min(student_shape[1], teacher_shape[1]); }
    int64_t width() const { return std::min(student_shape[2], teacher_shape[2]); }

    // Six maps of double, each with room for a whole vector at its end
    int64_t map_room() const { return (std::max(student_pixels(), teacher_pixels()) + 15) / 16 * 16; }
    size_t scratch_bytes() const { return loss == KDLAB_ATTENTION ? 6 * sizeof(double) * map_room() : 0; }
};

// Angles: the corners go to a few blocks, whatever the threads. The gradient at the entries of a corner's own row is written
// where it belongs; what every corner adds to at the entries of pairs (i, k) comes into a part for each block.
struct AngleJob : kdlab_angles {
    static constexpr int64_t tile = 8, together = 16;
    const double *student_own, *teacher_own;    // diagonals of the Gram matrices
    int64_t blocks;
    double* rows;                               // [count]: loss at each corner
    double* diagonals;                          // [blocks, count]: gradient at the diagonal
    double* parts;                              // [blocks, part_size]

    // Rows of a part begin at their tile: half a matrix.
    int64_t room() const { return (count + tile - 1) / tile * tile; }
    int64_t row_of_part(int64_t i) const {      // where column 0 would be
        const int64_t t = i / tile;
        return tile * (t * room() - tile * t * (t - 1) / 2) + (i - t * tile) * (room() - t * tile) - t * tile;
    }
    int64_t part_size() const { return row_of_part(room()) + room(); }
    int64_t corners() const { return std::max<int64_t>(2, std::min(together, 4096 / std::max(tile, room()))); }   // at a time
    size_t scratch_bytes() const { return corners() * 6 * sizeof(double) * room(); }
};

// Gram matrices, one piece of columns after the other. Every entry belongs to one tile, so that threads do not matter.
struct GramJob : kdlab_gram {
    enum Step { pack, centring, add_tiles, product };
    struct Tile { int64_t i, j; bool teacher; };    // rows of both sides, from there on four each
    int64_t from, width;                            // of the piece
    int64_t stride;                                 // of a packed row
    void* packed[3];                                // [rows, stride]
    const void* weights;                            // [count, rows]: what a sample adds to the gradients of all
    const Tile* tiles;
    double counted;                                 // how many samples count, at least 1
    bool stream;                                    // the gradient outgrows the cache: write it past the cache
    int64_t rows() const { return (count + 3) / 4 * 4; }
    bool pair() const { return teacher && !slopes; }
    bool counts(int64_t r) const { return r < count && (!mask || mask[r]); }
};

}  // namespace kdlab
