// What every instruction set shares: which rows count, what multiplies them, and the entry points of the kernels.
#pragma once
#include <cmath>
#include <cstdint>

#include "../kdlab.h"
#include "../kdlab_features.h"

#if defined(__GNUC__)
#define KDLAB_OUT_OF_LINE __attribute__((noinline))      // for what is large and called once a row
#define KDLAB_INLINE __attribute__((always_inline))      // for what an inner loop is made of, where the compiler may think otherwise
#else
#define KDLAB_OUT_OF_LINE
#define KDLAB_INLINE
#endif

namespace kdlab {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline double at(const void* p, int dtype, int64_t i) {
    return dtype == KDLAB_F64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}

inline void put(void* p, int dtype, int64_t i, double x) {
    if (!p) return;
    if (dtype == KDLAB_F64) static_cast<double*>(p)[i] = x;
    else static_cast<float*>(p)[i] = static_cast<float>(x);
}

// One call, with what follows from the arguments worked out once.
struct Job : kdlab_soft_kl {
    bool kl, ce;            // which terms are needed
    bool stream;            // the gradient outgrows the cache: write it past the cache
    bool rounds_bf16;       // has the CPU an instruction for that?
    double denominator;     // of the mean, else 1
    double* values;         // [rows]: weighted value of each row, for the reduction; absent without one

    bool counts(int64_t r) const { return !(mask && !mask[r]) && !(target && target[r] == ignore_index); }

    // d(out) / d(value of row r before its weight), times the incoming gradient
    double grad_scale(int64_t r) const {
        double g = grad_in ? at(grad_in, loss_dtype, reduction == KDLAB_NONE ? r : 0) : 1.0;
        if (row_weight) g *= at(row_weight, loss_dtype, r);
        return g == g ? g / denominator : NAN;              // of NaNs only this one: see give_pair
    }

    // The terms of row r (KL without kl_factor) go to every output that wants them.
    void write_row(int64_t r, double kl_term, double ce_term) const {
        double value = 0;
        if (kl) put(kl_rows, loss_dtype, r, kl_term * kl_factor);
        if (ce) put(ce_rows, loss_dtype, r, ce_term);
        if (kl_weight != 0) value += kl_weight * kl_factor * kl_term;
        if (ce_weight != 0) value += ce_weight * ce_term;
        if (row_weight) value *= at(row_weight, loss_dtype, r);
        if (values) values[r] = value;
        else put(out, loss_dtype, r, value);
    }

    void write_empty_row(int64_t r) const {
        put(kl_rows, loss_dtype, r, 0);
        put(ce_rows, loss_dtype, r, 0);
        if (values) values[r] = 0;
        else put(out, loss_dtype, r, 0);
    }
};

struct FeatureJob;          // in feature_job.h
struct AngleJob;            // there too
struct GramJob;
struct DistJob;             // in dist_job.h
struct SparseJob;           // in sparse_job.h

// The kernels of one instruction set. Rows [begin, end); scratch holds scratch_bytes(cols), aligned to 64.
struct Kernels {
    const char* name;
    void (*soft_kl)(const Job&, int64_t begin, int64_t end, void* scratch);
    void (*scale)(const kdlab_scale&, int64_t begin, int64_t end);
    void (*features)(const FeatureJob&, int64_t begin, int64_t end, void* scratch);
    void (*angles)(const AngleJob&, int64_t begin, int64_t end, void* scratch);
    void (*gram)(const GramJob&, int step, int64_t begin, int64_t end);
    void (*dist)(const DistJob&, int64_t begin, int64_t end, double* column, void* scratch);
    void (*sparse)(const SparseJob&, int64_t begin, int64_t end, void* scratch);
};
const Kernels& kernels_in_use();

constexpr int prefetch_ahead = 4096;        // bytes; hardware prefetchers alone leave a third of the bandwidth unused

// Three rows of double and a few more for the wide loop; five columns-first blocks of 64 bytes a column for the narrow.
inline size_t scratch_bytes(int64_t cols) {
    return cols <= 64 ? 5 * 64 * 64 : sizeof(double) * (3 * (static_cast<size_t>(cols) + 16) + cols / 8 + 2);
}

extern const Kernels kernels_base;
#if defined(__GNUC__) && defined(__x86_64__)
#define KDLAB_X86_KERNELS 1      // written with GNU vector types, which MSVC lacks: there the base kernels serve
extern const Kernels kernels_avx2, kernels_avx512;
#endif

}  // namespace kdlab
