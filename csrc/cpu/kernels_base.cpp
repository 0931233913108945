// The kernels in portable C++.
#include <cmath>
#include <cstring>

#include "dist_job.h"
#include "feature_job.h"
#include "half.h"
#include "rows.h"
#include "sparse_job.h"
#include "denormals.h"

#define KDLAB_ISA base
namespace kdlab {
#include "simd_base.h"
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

const Kernels kernels_base = {"base", base::soft_kl, base::scale, base::features, base::angles, base::gram, base::dist, base::sparse};
}  // namespace kdlab
