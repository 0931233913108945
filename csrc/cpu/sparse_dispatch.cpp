// Divergences from a sparse teacher: shares the rows out to threads and adds them up in their order.
#include <cmath>
#include <cstring>
#include <vector>

#include "sparse_job.h"
#include "threads.h"

using namespace kdlab;

int64_t kdlab_sparse_cpu(const kdlab_sparse* a) {
    SparseJob job;
    static_cast<kdlab_sparse&>(job) = *a;
    std::vector<double> values(a->rows);
    std::vector<char> bad(a->rows);
    job.values = values.data();
    job.bad = bad.data();

    int64_t counted = 0;
    for (int64_t r = 0; r < a->rows; ++r) counted += job.counts(r);
    job.denominator = 1;
    if (a->reduction == KDLAB_MEAN)
        job.denominator = std::isnan(a->normalizer) ? double(std::max<int64_t>(1, counted)) : a->normalizer;

    const size_t element = a->dtype == KDLAB_F64 ? 8 : a->dtype == KDLAB_F32 ? 4 : 2;
    const size_t grad_bytes = a->grad ? element * a->rows * a->cols : 0;
    job.stream = grad_bytes > (size_t(4) << 20) && (element * a->cols) % 64 == 0 &&
                 reinterpret_cast<uintptr_t>(a->grad) % 64 == 0;
    if (a->cols > 0)
        share_rows(a->rows, a->cols + a->k, a->threads, [&](int64_t begin, int64_t end) {
            kernels_in_use().sparse(job, begin, end, scratch_of(job.scratch_bytes()));
        });

    double sum = 0;
    for (int64_t r = 0; r < a->rows; ++r) {
        sum += values[r];
        if (a->reduction == KDLAB_NONE) put(a->out, a->loss_dtype, r, values[r]);
    }
    if (a->reduction != KDLAB_NONE) put(a->out, a->loss_dtype, 0, sum / job.denominator);
    for (int64_t r = 0; r < a->rows; ++r)
        if (bad[r]) return r;
    return -1;
}
