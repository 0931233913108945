// The C interface of the CUDA kernels: the descriptors of kdlab.h with a device, a stream and a workspace beside them.
// All tensors lie on that device; nothing here waits for it, allocates, or looks at a value. Every function returns
// null, or one line that says what went wrong.
#pragma once
#include "kdlab.h"
#include "kdlab_features.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kdlab_cuda_place {
    int device;
    void* stream;
    double* workspace;          // kdlab_cuda_workspace(rows) numbers
} kdlab_cuda_place;

// Room for the values of that many rows, and for the partial sums over them.
int64_t kdlab_cuda_workspace(int64_t rows);

// Divergences and cross-entropy of rows as kdlab_soft_kl describes them, with two differences. Numbers may lie on the
// device: an address here takes the place of the number there, and kl_factor is 1 or T^2 by t_squared. A row that
// counts and whose label lies outside [0, cols) is NaN, in value and gradient. The gradient may take the student's
// place.
typedef struct kdlab_cuda_rows {
    kdlab_soft_kl rows;         // threads, kl_factor: not read
    kdlab_cuda_place place;
    const double *T, *kl_weight, *ce_weight, *normalizer;
    int t_squared;
} kdlab_cuda_rows;

const char* kdlab_rows_cuda(const kdlab_cuda_rows* a);

// grad *= factor, in place; it costs nothing where one factor for all is 1.
const char* kdlab_scale_cuda(const kdlab_scale* a, const kdlab_cuda_place* place);

// Losses on features as kdlab_features describes them; the workspace holds kdlab_cuda_feature_workspace(a) numbers.
int64_t kdlab_cuda_feature_workspace(const kdlab_features* a);
const char* kdlab_features_cuda(const kdlab_features* a, const kdlab_cuda_place* place);

// Devices, or -1 with a line that says why there are none.
int kdlab_cuda_devices(const char** why);
const char* kdlab_cuda_unsupported(int device);     // null, or why these kernels do not run there

// For tests and measurements: plan as if a block had room for no more bytes of a row, and a cluster for no more blocks.
// 0: as they have it.
void kdlab_cuda_limits(int shared_bytes, int cluster);

#ifdef __cplusplus
}
#endif
