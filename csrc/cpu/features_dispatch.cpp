// Losses on features: shares the samples out to threads and adds them up in their order.
#include <cstring>
#include <vector>

#include "feature_job.h"
#include "threads.h"

using namespace kdlab;

void kdlab_features_cpu(const kdlab_features* a) {
    FeatureJob job;
    static_cast<kdlab_features&>(job) = *a;
    job.student_size = a->student_shape[0] * a->student_shape[1] * a->student_shape[2];
    job.teacher_size = a->teacher_shape[0] * a->teacher_shape[1] * a->teacher_shape[2];

    int64_t counted = 0;
    for (int64_t i = 0; i < a->samples; ++i) counted += job.counts(i);
    job.denominator = a->reduction == KDLAB_MEAN ? double(std::max<int64_t>(1, counted)) : 1;

    std::vector<double> values(a->samples);
    job.values = values.data();

    const size_t element = a->dtype == KDLAB_F64 ? 8 : a->dtype == KDLAB_F32 ? 4 : 2;
    const size_t grad_bytes = a->grad ? element * a->samples * job.student_size : 0;
    job.stream = grad_bytes > (size_t(4) << 20) && (element * job.student_size) % 64 == 0 &&
                 reinterpret_cast<uintptr_t>(a->grad) % 64 == 0;

    if (job.student_size > 0 && job.teacher_size > 0) {
        share_rows(a->samples, job.student_size + job.teacher_size, a->threads, [&](int64_t begin, int64_t end) {
            kernels_in_use().features(job, begin, end, scratch_of(job.scratch_bytes()));
        });
    } else if (grad_bytes) {
        std::memset(a->grad, 0, grad_bytes);
    }
    double sum = 0;
    for (int64_t i = 0; i < a->samples; ++i) {
        sum += values[i];
        if (a->reduction == KDLAB_NONE) put(a->out, a->loss_dtype, i, values[i]);
    }
    if (a->reduction != KDLAB_NONE) put(a->out, a->loss_dtype, 0, sum / job.denominator);
}

void kdlab_angles_cpu(const kdlab_angles* a) {
    const int64_t B = a->count;
    std::vector<double> rows(B), slopes(a->grad ? B * B : 0);
    share_rows(B, B * B, a->threads, [&](int64_t begin, int64_t end) {
        kernels_in_use().angles(*a, begin, end, rows.data(), slopes.data());
    });
    double sum = 0;
    for (double row : rows) sum += row;
    *a->out = sum;
    if (!a->grad) return;
    for (int64_t i = 0; i < B; ++i)
        for (int64_t j = 0; j < B; ++j) {
            a->grad[i * B + j] -= 2 * slopes[i * B + j];        // G_ij and, as G_jk of the triple seen from k, again
            a->grad[j * B + j] += slopes[i * B + j];
        }
}
