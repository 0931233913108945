// The C interface of kdlab's fast core: plain structs of addresses, sizes and numbers. It knows neither Python nor
// torch, so one build works with every version of both.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum kdlab_dtype { KDLAB_F32 = 0, KDLAB_F64 = 1, KDLAB_BF16 = 2, KDLAB_F16 = 3 };
enum kdlab_kind {
    KDLAB_FORWARD_KL = 0, KDLAB_REVERSE_KL = 1, KDLAB_JSD = 2, KDLAB_SKEW_KL = 3, KDLAB_SKEW_REVERSE_KL = 4,
    KDLAB_TOTAL_VARIATION = 5, KDLAB_SOFT_CROSS_ENTROPY = 6, KDLAB_DKD = 7, KDLAB_NKD = 8,
    KDLAB_LOGIT_MSE = 9
};
// Those that set the label's class apart from the others, and so need a target
static inline int kdlab_kind_has_label(int kind) { return kind == KDLAB_DKD || kind == KDLAB_NKD; }
// The divergences that a mixture becomes at its ends: GKD's limits of jsd, and no skew.
static inline int kdlab_kind_at_ends(int kind, double mix) {
    if (kind == KDLAB_JSD && mix == 1) return KDLAB_REVERSE_KL;
    if (mix != 0) return kind;
    return kind == KDLAB_JSD || kind == KDLAB_SKEW_KL ? KDLAB_FORWARD_KL : kind == KDLAB_SKEW_REVERSE_KL ? KDLAB_REVERSE_KL : kind;
}
enum kdlab_reduction { KDLAB_NONE = 0, KDLAB_SUM = 1, KDLAB_MEAN = 2 };

// Softened forward KL with an optional hard cross-entropy, forward and gradient in one sweep. The value of a row is
//
//     row_weight * (kl_weight * kl_factor * KL(softmax(teacher / T) || softmax(student / T))
//                   + ce_weight * CE(softmax(student), target))
//
// A null pointer means "absent". `loss` below is the dtype loss_dtype (KDLAB_F32 or KDLAB_F64).
typedef struct kdlab_soft_kl {
    const void* student;        // [rows, cols], rows student_stride elements apart
    const void* teacher;        // [rows, cols], rows teacher_stride elements apart; may be absent if kl_weight is 0
    const int64_t* target;      // [rows]
    const uint8_t* mask;        // [rows]; 1: the row counts
    const void* row_weight;     // loss[rows]; multiplies the row's value, not the denominator of the mean
    const void* grad_in;        // loss[1], or loss[rows] without reduction: incoming gradient
    void* grad;                 // [rows, cols], contiguous, dtype of the student
    void* kl_rows;              // loss[rows]: kl_factor * KL of each row
    void* ce_rows;              // loss[rows]: CE of each row
    void* out;                  // loss[1], or loss[rows] without reduction
    int dtype;                  // of student, teacher and grad
    int loss_dtype;
    int64_t rows, cols, student_stride, teacher_stride;
    double T, kl_factor, kl_weight, ce_weight;
    int reduction;
    double normalizer;          // denominator of the mean; NaN: the number of rows that count
    int64_t ignore_index;       // a row with this target does not count
    int threads;
    int kind;                   // which divergence takes the place of KL
    double mix;                 // beta of jsd, alpha of the skew ones and of dkd (its weight of the label); logit_mse: 1 to centre
    double others;              // beta of dkd, gamma of nkd: weight of the other classes
} kdlab_soft_kl;

// Returns -1, or the first row that counts and whose label lies outside [0, cols): then nothing is written.
int64_t kdlab_soft_kl_cpu(const kdlab_soft_kl* a);

// grad *= factor, in place; one factor for all, or one per row.
typedef struct kdlab_scale {
    void* grad;                 // [rows, cols], contiguous
    const void* factor;         // loss[1] or loss[rows]
    int dtype, factor_dtype;
    int64_t rows, cols;
    int per_row, threads;
} kdlab_scale;

void kdlab_scale_cpu(const kdlab_scale* a);

// Instruction sets by name ("base", "avx2", "avx512"). Setting one that this CPU lacks takes the best below it.
const char* kdlab_isa(void);
int kdlab_set_isa(const char* name);          // 0, or -1 for an unknown name
const char* kdlab_isa_at(int i);              // the i-th one that runs here, worst first; null at the end

#ifdef __cplusplus
}
#endif
