// The C interface of divergences from a sparse teacher: beside kdlab.h, in the same manner. A null pointer means "absent".
#pragma once
#include "kdlab.h"

#ifdef __cplusplus
extern "C" {
#endif

// What becomes of the teacher's mass outside the kept classes; the equations are in cpu/sparse.h.
enum kdlab_tail { KDLAB_DROP = 0, KDLAB_RENORMALISE = 1, KDLAB_BUCKET = 2, KDLAB_UNIFORM = 3 };

// KL between a teacher of which k classes a row are known and softmax(student / T), forward and gradient in one sweep.
typedef struct kdlab_sparse {
    const void* student;        // [rows, cols], rows student_stride elements apart
    const double* log_probs;    // [rows, k]: of the kept classes, at temperature T; -inf pads
    const int64_t* ids;         // [rows, k]: their classes
    const uint8_t* mask;        // [rows]; 1: the row counts
    const void* row_weight;     // loss[rows]; multiplies the row's value, not the denominator of the mean
    const void* grad_in;        // loss[1], or loss[rows] without reduction: incoming gradient
    void* grad;                 // [rows, cols], contiguous, dtype of the student
    void* out;                  // loss[1], or loss[rows] without reduction
    int dtype, loss_dtype;
    int64_t rows, cols, student_stride, k;
    double T, factor;           // factor multiplies the divergence
    int reduction;
    double normalizer;          // denominator of the mean; NaN: the number of rows that count
    int reverse;                // KL(student || teacher) in place of KL(teacher || student); with KDLAB_BUCKET only
    int tail, threads;
} kdlab_sparse;

// Returns -1, or the first row that counts and is bad, which makes it NaN: a class outside [0, cols) or kept twice, or a
// mass above 1.05.
int64_t kdlab_sparse_cpu(const kdlab_sparse* a);

#ifdef __cplusplus
}
#endif
