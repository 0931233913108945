// DIST: moments of blocks of rows, correlations of the columns, gradients of the rows.
#include <vector>

#include "dist_job.h"
#include "threads.h"

using namespace kdlab;

namespace {
constexpr int64_t most_blocks = 8;      // whatever the threads: the columns' sums always go in the same order
}

void kdlab_dist_cpu(const kdlab_dist* a) {
    DistJob job;
    static_cast<kdlab_dist&>(job) = *a;
    const int64_t rows = a->rows, cols = a->cols, room = job.room();
    int64_t counted = 0;
    for (int64_t r = 0; r < rows; ++r) counted += job.counts(r);
    std::vector<Pearson> row_parts(rows);
    job.row_parts = row_parts.data();
    job.row_scale = counted ? 1.0 / double(counted) : 0;
    job.scale = a->factor * (a->grad_in ? at(a->grad_in, a->loss_dtype, 0) : 1.0);
    const size_t scratch = 2 * sizeof(double) * room + sizeof(double) * room;

    const int64_t blocks = std::max<int64_t>(1, std::min(most_blocks, rows));
    std::vector<double> moments(blocks * 5 * room), columns(4 * room);
    share_rows(blocks, (rows + blocks - 1) / blocks * cols, a->threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            kernels_in_use().dist(job, rows * b / blocks, rows * (b + 1) / blocks, &moments[b * 5 * room], scratch_of(scratch));
    });
    double value = 0, by_column = 0;
    for (const Pearson& row : row_parts) value += row.apart * job.row_scale;
    double *mean_p = columns.data(), *mean_q = mean_p + room, *own = mean_q + room, *other = own + room;
    for (int64_t c = 0; c < cols && counted; ++c) {
        double sums[5] = {};
        for (int64_t b = 0; b < blocks; ++b)
            for (int k = 0; k < 5; ++k) sums[k] += moments[(b * 5 + k) * room + c];
        const Pearson x(sums[0], sums[1], sums[2], sums[3], sums[4], double(counted));
        by_column += x.apart;
        mean_p[c] = sums[0] / double(counted);
        mean_q[c] = sums[1] / double(counted);
        own[c] = x.own / double(cols);
        other[c] = x.other / double(cols);
    }
    if (cols) value += by_column / double(cols);
    put(a->out, a->loss_dtype, 0, a->factor * value);
    if (!a->grad) return;
    job.mean_p = mean_p;
    job.mean_q = mean_q;
    job.own = own;
    job.other = other;
    share_rows(rows, cols, a->threads, [&](int64_t begin, int64_t end) {
        kernels_in_use().dist(job, begin, end, nullptr, scratch_of(scratch));
    });
}
