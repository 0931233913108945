// Gram matrices: pieces of columns, and what of each goes to which thread.
#include <algorithm>
#include <memory>
#include <vector>

#include "feature_job.h"
#include "threads.h"

using namespace kdlab;

namespace {
constexpr int64_t piece_bytes = 768 << 10;      // all that is packed of one, about: most of a second cache

// Row j is what sample j adds to the gradients of all: the slopes of ij and ji together, without what would move a sample that
// does not count, or the mean where that was taken out.
template <class R>
void set_weights(const GramJob& job, R* row) {
    const int64_t B = job.count;
    std::vector<double> x(B);
    for (int64_t j = 0; j < B; ++j, row += job.rows()) {
        double mean = 0;
        for (int64_t i = 0; i < B; ++i) {
            x[i] = job.counts(i) ? job.slopes[j * B + i] + job.slopes[i * B + j] : 0;
            mean += x[i];
        }
        mean = job.centre ? mean / job.counted : 0;
        for (int64_t i = 0; i < job.rows(); ++i) row[i] = job.counts(i) ? R(x[i] - mean) : 0;
    }
}
}  // namespace

void kdlab_gram_cpu(const kdlab_gram* a) {
    GramJob job;
    static_cast<kdlab_gram&>(job) = *a;
    const int64_t rows = job.rows(), size = a->wide == KDLAB_F64 ? 8 : 4;
    const int sides = job.pair() ? 3 : 1;
    job.counted = 0;
    for (int64_t r = 0; r < a->count; ++r) job.counted += job.counts(r);
    job.counted = std::max(1.0, job.counted);
    const int64_t element = a->student_dtype == KDLAB_F64 ? 8 : a->student_dtype == KDLAB_F32 ? 4 : 2;
    job.stream = a->grad && element == size && element * a->count * a->columns > (int64_t(4) << 20) &&
                 element * a->columns % 64 == 0 && reinterpret_cast<uintptr_t>(a->grad) % 64 == 0;

    const int64_t most = std::max<int64_t>(64, piece_bytes / (size * sides * std::max<int64_t>(1, rows)) / 64 * 64);
    const int64_t pieces = std::max<int64_t>(1, (a->columns + most - 1) / most);
    const int64_t widest = std::max<int64_t>(64, (a->columns + 64 * pieces - 1) / (64 * pieces) * 64);
    job.stride = widest + 16;                   // rows of a power of two would share few places in the cache
    std::unique_ptr<char[]> memory(new char[sides * rows * job.stride * size + 64]);
    char* at = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    for (int k = 0; k < 3; ++k) job.packed[k] = at + std::min(k, sides - 1) * rows * job.stride * size;

    std::unique_ptr<char[]> weights(a->slopes ? new char[a->count * rows * size] : nullptr);
    job.weights = weights.get();
    if (a->slopes && size == 8) set_weights(job, reinterpret_cast<double*>(weights.get()));
    else if (a->slopes) set_weights(job, reinterpret_cast<float*>(weights.get()));
    std::vector<GramJob::Tile> tiles;
    for (int64_t i = 0; i < rows && !a->slopes; i += 4)
        for (int64_t j = 0; j < rows; j += 4) {
            if (job.pair() || j >= i) tiles.push_back({i, j, false});
            if (job.pair() && j >= i) tiles.push_back({i, j, true});
        }
    job.tiles = tiles.data();
    auto clear = [&](double* x) { std::fill(x, x + a->count * a->count, 0.0); };
    if (!a->slopes) clear(a->gram);
    if (job.pair()) clear(a->teacher_gram);

    auto share = [&](int step, int64_t n, int64_t work) {
        share_rows(n, work, a->threads, [&](int64_t begin, int64_t end) { kernels_in_use().gram(job, step, begin, end); });
    };
    for (job.from = 0; job.from < a->columns; job.from += widest) {
        job.width = std::min(widest, a->columns - job.from);
        share(GramJob::pack, rows, sides * job.width);
        if (a->centre) share(GramJob::centring, (job.width + 15) / 16, rows * 16);
        if (a->slopes) share(GramJob::product, (job.width + 63) / 64, a->count * a->count * 16);
        else share(GramJob::add_tiles, static_cast<int64_t>(tiles.size()), 4 * job.width);
    }
    auto mirror = [&](double* x, double* other) {
        for (int64_t i = 0; i < a->count; ++i)
            for (int64_t j = i; j < a->count; ++j) {
                double &upper = x[i * a->count + j], &lower = x[j * a->count + i];
                if (other) upper = (upper + lower) / 2 + other[i * a->count + j];
                lower = upper;
            }
    };
    if (job.pair()) mirror(a->teacher_gram, nullptr);
    if (!a->slopes) mirror(a->gram, job.pair() ? a->teacher_gram : nullptr);
}
