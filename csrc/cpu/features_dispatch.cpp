// Losses on features: shares the samples out to threads and adds them up in their order.
#include <cstring>
#include <memory>
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
    AngleJob job;
    static_cast<kdlab_angles&>(job) = *a;
    job.blocks = std::min<int64_t>(B, B <= 256 ? 4 : 8);
    std::vector<double> rows(3 * B), diagonals(a->grad ? job.blocks * B : 0);
    std::unique_ptr<double[]> memory(a->grad ? new double[job.blocks * job.part_size() + 8] : nullptr);
    double* parts = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(double);
    double *student_own = rows.data() + B, *teacher_own = student_own + B;
    for (int64_t i = 0; i < B; ++i) {
        student_own[i] = a->student[i * B + i];
        teacher_own[i] = a->teacher[i * B + i];
    }
    job.student_own = student_own;
    job.teacher_own = teacher_own;
    job.rows = rows.data();
    job.diagonals = diagonals.data();
    job.parts = parts;
    share_rows(job.blocks, B * B, a->threads, [&](int64_t begin, int64_t end) {
        kernels_in_use().angles(job, begin, end, scratch_of(job.scratch_bytes()));
    });
    double sum = 0;
    for (int64_t i = 0; i < B; ++i) sum += rows[i];
    *a->out = sum;
    for (int64_t i = 0; a->grad && i < B; ++i) {
        const int64_t tile = i - i % AngleJob::tile, next = std::min(B, tile + AngleJob::tile);
        double* row = a->grad + i * B;
        for (int64_t b = 0; b < job.blocks; ++b) {
            const double* part = parts + b * job.part_size() + job.row_of_part(i);
            row[i] += diagonals[b * B + i];
            for (int64_t k = tile; k < next; ++k) row[k] += part[k];
            for (int64_t k = next; k < B; ++k) row[k] += 2 * part[k];       // for ki as well
        }
    }
}
