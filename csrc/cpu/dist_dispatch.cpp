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
    std::vector<DistRow> row_parts(rows);
    job.row_parts = row_parts.data();
    job.stream = a->grad && a->rows * a->cols * (a->dtype == KDLAB_F64 ? 8 : a->dtype == KDLAB_F32 ? 4 : 2) > (int64_t(4) << 20);
    job.row_scale = counted ? 1.0 / double(counted) : 0;
    job.scale = a->factor * (a->grad_in ? at(a->grad_in, a->loss_dtype, 0) : 1.0);
    const size_t scratch = job.scratch_bytes();

    const int64_t blocks = std::max<int64_t>(1, std::min(most_blocks, rows));
    std::vector<double> moments(blocks * 6 * room), columns(9 * room);
    share_rows(blocks, (rows + blocks - 1) / blocks * cols, a->threads, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b)
            kernels_in_use().dist(job, rows * b / blocks, rows * (b + 1) / blocks, &moments[b * 6 * room], scratch_of(scratch));
    });
    double value = 0, by_column = 0;
    for (int64_t r = 0; r < rows; ++r)
        if (job.counts(r)) value += row_parts[r].pearson.apart * job.row_scale;
    job.columns = columns.data();
    const int precision = a->dtype == KDLAB_F64 ? KDLAB_F64 : KDLAB_F32;
    auto column = [&](int k, int64_t c, double x) {             // as it is rounded there
        put(columns.data(), precision, k * room + c, x);
        return at(columns.data(), precision, k * room + c);
    };
    for (int64_t c = 0; c < cols && counted; ++c) {
        PairSums sums = {};
        for (int64_t b = 0; b < blocks; ++b) {
            const double* m = &moments[b * 6 * room + c];
            sums = {sums.q + m[0], sums.d + m[room], sums.qq + m[2 * room], sums.qd + m[3 * room], sums.dd + m[4 * room],
                    sums.pp + m[5 * room]};
        }
        const Pearson x(sums, double(counted));
        by_column += x.apart;
        const double q = sums.q / double(counted), d = sums.d / double(counted), share = x.length / double(cols);
        const double rest_q = q - column(0, c, q), own = column(1, c, x.own * share);
        column(2, c, x.length == 0 ? 0 : 1 / x.length);
        for (int form : {3, 6}) {                               // of close rows, and of the others
            const double mean = form == 3 ? d : q + d, rest = mean - column(form, c, mean);
            const double other = column(form + 1, c, (form == 3 ? x.other : x.other - x.own) * share);
            column(form + 2, c, -(own * rest + other * rest_q));
        }
    }
    if (cols) value += by_column / double(cols);
    put(a->out, a->loss_dtype, 0, a->factor * value);
    if (!a->grad) return;
    share_rows(rows, cols, a->threads, [&](int64_t begin, int64_t end) {
        kernels_in_use().dist(job, begin, end, nullptr, scratch_of(scratch));
    });
}
