// The kernels for x86 CPUs with AVX2. The target holds from the pragma to the end of this file, and for all that is
// instantiated in it; the standard headers come before, so that their code stays fit for every CPU.
#include <cmath>
#include <cstring>

#include "dist_job.h"
#include "feature_job.h"
#include "half.h"
#include "rows.h"
#include "sparse_job.h"
#include "denormals.h"

#ifdef KDLAB_X86_KERNELS
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"        // from GCC 12's own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,f16c")
#endif

#define KDLAB_ISA avx2
namespace kdlab {
#include "simd_avx2.h"
#include "vector_math.h"
#include "softened.h"
#include "decoupled.h"
#include "family_rows.h"
#include "wide_rows.h"
#include "narrow_rows.h"
#include "soft_kl.h"
#include "scale.h"
#include "features.h"
#include "angles.h"
#include "dist.h"
#include "gram.h"
#include "sparse.h"

const Kernels kernels_avx2 = {"avx2", avx2::soft_kl, avx2::scale, avx2::features, avx2::angles, avx2::gram, avx2::dist, avx2::sparse};
}  // namespace kdlab

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
