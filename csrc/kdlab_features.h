// The C interface of the losses on features: beside kdlab.h, in the same manner. A null pointer means "absent".
#pragma once
#include "kdlab.h"

#ifdef __cplusplus
extern "C" {
#endif

enum kdlab_feature_loss {
    KDLAB_HINT = 0,             // mean of (s - t)^2
    KDLAB_DIRECTION = 1,        // mean of (s/|s| - t/|t|)^2
    KDLAB_COSINE = 2,           // 1 - cos(s, t)
    KDLAB_ATTENTION = 3         // mean of (a_s - a_t)^2, a = m/|m| over space, m = channel mean of squares
};

// A value for each sample, forward and gradient. The first three see a sample as one vector; attention pools the maps to
// the smaller of both heights and widths (adaptive averages), and the channels may differ.
typedef struct kdlab_features {
    const void* student;        // [samples, student_shape], contiguous
    const void* teacher;        // [samples, teacher_shape], contiguous, same dtype
    const uint8_t* mask;        // [samples]; 1: the sample counts
    const void* grad_in;        // loss[1], or loss[samples] without reduction: incoming gradient
    void* grad;                 // [samples, student_shape], contiguous, dtype of the student
    void* out;                  // loss[1], or loss[samples] without reduction
    int loss;
    int dtype, loss_dtype;
    int64_t samples;
    int64_t student_shape[3], teacher_shape[3];     // channels, height, width
    int reduction;              // the mean divides by the samples that count
    int threads;
} kdlab_features;

void kdlab_features_cpu(const kdlab_features* a);

// The angles of all triangles of samples, compared by smooth L1 (relational distillation). With a Gram matrix G and n, one
// over the distances (0 for equal samples and for those left out), the cosine at j between i and k is
// (G_ik - G_ij - G_jk + G_jj) n_ij n_jk. Matrices are symmetric [count, count], row by row. The gradient is right for
// symmetric changes: what belongs to the entries ij and ji together may lie in one of them.
typedef struct kdlab_angles {
    const double* student;          // Gram matrix
    const double* teacher;
    const uint8_t* mask;            // [count]; 1: the sample counts
    double* out;                    // [1]: sum over all triples
    double* grad;                   // [count, count]: d out / d student
    int64_t count;
    int threads;
} kdlab_angles;

void kdlab_angles_cpu(const kdlab_angles* a);

// Gram matrices of samples, X X^T, or of a student and a teacher of the same width, T T^T and from it S S^T, with the digits
// of S S^T - T T^T = (D W^T + W D^T) / 2, D = S - T, W = S + T. Or the gradient that comes back from X X^T. Samples that do not
// count are zeros, and where asked the mean of the others is taken out first.
typedef struct kdlab_gram {
    const void* student;        // [count, columns], contiguous
    const void* teacher;        // the same, or absent
    const uint8_t* mask;        // [count]; 1: the sample counts
    double* gram;               // [count, count]
    double* teacher_gram;
    const double* slopes;       // [count, count]: d loss / d gram; where given, grad is filled instead
    void* grad;                 // [count, columns], contiguous, dtype of the student: (slopes + slopes^T) X
    int student_dtype, teacher_dtype;
    int wide;                   // KDLAB_F32 or KDLAB_F64: what products are made in
    int centre;                 // without a teacher only
    int64_t count, columns;
    int threads;
} kdlab_gram;

void kdlab_gram_cpu(const kdlab_gram* a);

// DIST on logits: factor * (mean over rows of 1 - Pearson(p, q) + mean over columns of the same), p = softmax(student / T).
// A constant row or column counts as uncorrelated.
typedef struct kdlab_dist {
    const void* student;        // [rows, cols], rows student_stride elements apart
    const void* teacher;        // [rows, cols], rows teacher_stride elements apart, same dtype
    const uint8_t* mask;        // [rows]; 1: the row counts
    const void* grad_in;        // loss[1]: incoming gradient
    void* grad;                 // [rows, cols], contiguous, dtype of the student
    void* out;                  // loss[1]
    int dtype, loss_dtype;
    int64_t rows, cols, student_stride, teacher_stride;
    double T, factor;
    int threads;
} kdlab_dist;

void kdlab_dist_cpu(const kdlab_dist* a);

#ifdef __cplusplus
}
#endif
