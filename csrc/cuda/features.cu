// Losses on features: hint, direction, cosine, attention transfer; the twin of cpu/features.h. Sums, and what follows
// from them, are in double: products of floats are exact there, so that nothing cancels where student and teacher
// agree.
//
// A sample is shared out to several blocks. Each leaves its part of the sums in the workspace, and the next launch adds
// them up in one fixed order.
#include <algorithm>

#include "../kdlab_cuda.h"
#include "device.h"
#include "team.h"

namespace kdlab {
namespace {

constexpr int block_threads = 256, part_elements = 8192, most_parts = 64;
constexpr int pixel_lanes = 32, channel_groups = block_threads / pixel_lanes;
constexpr int first_sums = 3;                       // of a part: |s|^2, |t|^2, s t; for the hint, of d^2

struct FeaturesJob : kdlab_features {
    int64_t student_size, teacher_size;             // elements of a sample
    int parts;                                      // blocks that share a sample
    int64_t student_pixels, teacher_pixels, height, width;      // attention: of the maps, and of the smaller of both
    // workspace
    double *count, *values, *sums;                  // [1], [samples], [samples, parts, first_sums]
    double *student_map, *teacher_map, *student_cells, *teacher_cells, *factor;

    KDLAB_DEVICE bool takes(int64_t i) const { return !mask || mask[i]; }
    KDLAB_DEVICE double denominator() const {
        if (reduction != KDLAB_MEAN) return 1;
        const double n = mask ? *count : double(samples);
        return n > 1 ? n : 1;
    }
    // d(out) / d(value of sample i), times the incoming gradient
    KDLAB_DEVICE double grad_scale(int64_t i) const {
        return (grad_in ? at(grad_in, loss_dtype, reduction == KDLAB_NONE ? i : 0) : 1.0) / denominator();
    }
};

KDLAB_DEVICE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// How many samples count
KDLAB_KERNEL(block_threads) count_samples(const FeaturesJob job) {
    const Team team(block_threads, 1, shared_memory());
    double n[1] = {0};
    for (int64_t i = team.rank; i < job.samples; i += team.size) n[0] += job.takes(i);
    team.combine(n, Add(), 0);
    if (team.rank == 0) *job.count = n[0];
}

KDLAB_KERNEL(block_threads) reduce_samples(const FeaturesJob job) {
    const Team team(block_threads, 1, shared_memory());
    double total[1] = {0};
    for (int64_t i = team.rank; i < job.samples; i += team.size) {
        if (job.reduction == KDLAB_NONE) put(job.out, job.loss_dtype, i, job.values[i]);
        total[0] += job.values[i];
    }
    team.combine(total, Add(), 0);
    if (team.rank == 0 && job.reduction != KDLAB_NONE) put(job.out, job.loss_dtype, 0, total[0] / job.denominator());
}

// The elements of a sample that one block takes
template <class E>
struct Part {
    static constexpr int V = 16 / sizeof(E);
    const E *s, *t;
    E* grad;
    int64_t count, packs;                           // elements, and 16 bytes of them, where all are aligned

    KDLAB_DEVICE Part(const FeaturesJob& job, int64_t sample, int part) {
        const int64_t n = job.student_size, step = ((n + job.parts - 1) / job.parts + V - 1) / V * V;
        const int64_t begin = step * part < n ? step * part : n, end = begin + step < n ? begin + step : n;
        s = static_cast<const E*>(job.student) + sample * n + begin;
        t = static_cast<const E*>(job.teacher) + sample * n + begin;
        grad = job.grad ? static_cast<E*>(job.grad) + sample * n + begin : nullptr;
        count = end - begin;
        packs = aligned(s) && aligned(t) && aligned(grad) ? count / V : 0;
    }

    // grad = body(s, t), or body alone if there is no gradient to write
    template <class Body>
    KDLAB_DEVICE void each(E* to, Body body) const {
        KDLAB_AS_IT_IS
        for (int64_t p = threadIdx.x; p < packs; p += block_threads) {
            const Pack<E> a = *pack_at(s + p * V), b = *pack_at(t + p * V);
            decltype(element(a, 0)) g[V];
            KDLAB_UNROLL
            for (int i = 0; i < V; ++i) g[i] = decltype(g[0] + 0)(body(double(element(a, i)), double(element(b, i))));
            if (!to) continue;
            Pack<E> pack;
            assemble(g, &pack);
            store_once(pack_at(to + p * V), pack);
        }
        KDLAB_AS_IT_IS
        for (int64_t i = packs * V + threadIdx.x; i < count; i += block_threads) {
            const auto g = decltype(to_real(*s))(body(double(to_real(s[i])), double(to_real(t[i]))));
            if (to) from_real(g, to + i);
        }
    }
};

// The sums of one part; for the hint its gradient as well, 2 d / n
template <class E>
KDLAB_KERNEL(block_threads) sum_parts(const FeaturesJob job) {
    const int64_t sample = blockIdx.x / unsigned(job.parts);
    const int number = int(blockIdx.x % unsigned(job.parts));
    const Part<E> part(job, sample, number);
    const Team team(block_threads, 1, shared_memory());
    double x[first_sums] = {0, 0, 0};
    if (job.takes(sample)) {
        if (job.loss == KDLAB_HINT) {
            const double factor = part.grad ? 2 * job.grad_scale(sample) / double(job.student_size) : 0;
            part.each(part.grad, [&](double s, double t) {
                const double d = s - t;
                x[0] += d * d;
                return d * factor;
            });
        } else {
            part.each(nullptr, [&](double s, double t) {
                x[0] += s * s;
                x[1] += t * t;
                x[2] += s * t;
                return 0.0;
            });
        }
    } else if (job.loss == KDLAB_HINT && part.grad) {
        part.each(part.grad, [](double, double) { return 0.0; });
    }
    team.combine(x, Add(), 0);
    if (team.rank == 0)
        for (int i = 0; i < first_sums; ++i) job.sums[(sample * job.parts + number) * first_sums + i] = x[i];
}

// The value of a sample from its sums; of direction and cosine the gradient:
//
//     gap = |s/|s| - t/|t||^2 = 2 (1 - cos),   d gap / d s = 2 / |s| (cos s/|s| - t/|t|)
//
// Direction: gap / n, where a zero vector stays zero. Cosine: gap / 2, or 1 where an angle does not exist.
template <class E>
KDLAB_KERNEL(block_threads) finish_parts(const FeaturesJob job) {
    const int64_t sample = blockIdx.x / unsigned(job.parts);
    const int number = int(blockIdx.x % unsigned(job.parts));
    const Part<E> part(job, sample, number);
    const bool first = threadIdx.x == 0 && number == 0;
    if (!job.takes(sample)) {
        if (first) job.values[sample] = 0;
        if (job.loss != KDLAB_HINT && part.grad) part.each(part.grad, [](double, double) { return 0.0; });
        return;
    }
    double x[first_sums] = {0, 0, 0};
    KDLAB_AS_IT_IS
    for (int p = 0; p < job.parts; ++p)
        for (int i = 0; i < first_sums; ++i) x[i] += job.sums[(sample * job.parts + p) * first_sums + i];
    const double n = double(job.student_size);
    if (job.loss == KDLAB_HINT) {
        if (first) job.values[sample] = x[0] / n;
        return;
    }
    const double length_s = sqrt(x[0]), length_t = sqrt(x[1]), share = job.loss == KDLAB_COSINE ? 0.5 : 1 / n;
    const bool exist = length_s != 0 && length_t != 0;
    const double cosine = x[2] / length_s / length_t, gap = 2 * (1 - cosine), spoilt = 0 * (length_s + length_t);
    if (first) {
        const double none = job.loss == KDLAB_COSINE ? 1 : ((length_s != 0) + (length_t != 0)) / n;
        job.values[sample] = exist ? (gap > 0 ? gap : 0 * gap) * share : none + spoilt;
    }
    if (!part.grad) return;
    const double k = exist ? 2 * share * job.grad_scale(sample) / length_s : 0;
    const double of_s = exist ? k * cosine / length_s : spoilt, of_t = exist ? k / length_t : 0;
    part.each(part.grad, [&](double s, double t) { return exist ? of_s * s - of_t * t : of_s; });
}

// ---- attention transfer --------------------------------------------------------------------------------------------
// The channel mean of squares of 32 pixels: eight groups of threads share the channels.
template <class E>
KDLAB_DEVICE void square_map(const E* x, int64_t channels, int64_t pixels, int64_t first_pixel, double* map) {
    double* shared = reinterpret_cast<double*>(shared_memory());
    const int lane = int(threadIdx.x) % pixel_lanes, group = int(threadIdx.x) / pixel_lanes;
    const int64_t p = first_pixel + lane;
    double sum = 0;
    if (p < pixels) {
        int64_t c = group;
        constexpr int ahead = 4;
        KDLAB_AS_IT_IS
        for (; c + (ahead - 1) * channel_groups < channels; c += ahead * channel_groups) {
            E y[ahead];
            KDLAB_UNROLL
            for (int j = 0; j < ahead; ++j) y[j] = x[(c + j * channel_groups) * pixels + p];
            KDLAB_UNROLL
            for (int j = 0; j < ahead; ++j) sum += double(to_real(y[j])) * double(to_real(y[j]));
        }
        KDLAB_AS_IT_IS
        for (; c < channels; c += channel_groups) {
            const double y = to_real(x[c * pixels + p]);
            sum += y * y;
        }
    }
    shared[threadIdx.x] = sum;
    block_sync();
    if (group || p >= pixels) return;
    for (int g = 1; g < channel_groups; ++g) sum += shared[g * pixel_lanes + lane];
    map[p] = sum / double(channels);
}

template <class E>
KDLAB_KERNEL(block_threads) square_maps(const FeaturesJob job) {
    const int64_t of_student = (job.student_pixels + pixel_lanes - 1) / pixel_lanes;
    const int64_t tiles = of_student + (job.teacher_pixels + pixel_lanes - 1) / pixel_lanes;
    const int64_t sample = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    if (!job.takes(sample)) return;
    const bool student = tile < of_student;
    const int64_t pixels = student ? job.student_pixels : job.teacher_pixels;
    const E* x = static_cast<const E*>(student ? job.student : job.teacher);
    square_map(x + sample * (student ? job.student_size : job.teacher_size),
               student ? job.student_shape[0] : job.teacher_shape[0], pixels,
               (student ? tile : tile - of_student) * pixel_lanes,
               (student ? job.student_map : job.teacher_map) + sample * pixels);
}

// Adaptive averages as torch has them: cell i of m averages [i n / m, ceil((i + 1) n / m)) of n.
KDLAB_DEVICE int64_t cell_begin(int64_t i, int64_t n, int64_t m) { return i * n / m; }
KDLAB_DEVICE int64_t cell_end(int64_t i, int64_t n, int64_t m) { return ((i + 1) * n + m - 1) / m; }

KDLAB_DEVICE double cell_mean(const double* map, const int64_t* shape, int64_t height, int64_t width, int64_t cell) {
    const int64_t top = cell_begin(cell / width, shape[1], height), bottom = cell_end(cell / width, shape[1], height);
    const int64_t left = cell_begin(cell % width, shape[2], width), right = cell_end(cell % width, shape[2], width);
    double sum = 0;
    for (int64_t y = top; y < bottom; ++y)
        for (int64_t x = left; x < right; ++x) sum += map[y * shape[2] + x];
    return sum / double((bottom - top) * (right - left));
}

// The sum over the cells that hold a pixel, of what each passes on to each of its pixels
template <class OfCell>
KDLAB_DEVICE double pass_on(const int64_t* shape, int64_t height, int64_t width, int64_t pixel, OfCell of_cell) {
    const int64_t py = pixel / shape[2], px = pixel % shape[2];
    double sum = 0;
    for (int64_t i = py * height / shape[1]; i < height && cell_begin(i, shape[1], height) <= py; ++i) {
        const int64_t rows = cell_end(i, shape[1], height) - cell_begin(i, shape[1], height);
        if (cell_end(i, shape[1], height) <= py) continue;
        for (int64_t j = px * width / shape[2]; j < width && cell_begin(j, shape[2], width) <= px; ++j) {
            const int64_t columns = cell_end(j, shape[2], width) - cell_begin(j, shape[2], width);
            if (cell_end(j, shape[2], width) > px) sum += of_cell(i * width + j) / double(rows * columns);
        }
    }
    return sum;
}

// One block for a sample. With u the student's map, a = u/|u|, b the teacher's, g = a - b, over n pixels:
//
//     value = mean g^2,   d value / d u = 2 / (n |u|) (g - a (a . g)),   d u / d s = 2 s / channels
//
// The factor is what every channel of s is multiplied by in the gradient, pixel by pixel.
KDLAB_KERNEL(block_threads) compare_maps(const FeaturesJob job) {
    const int64_t sample = blockIdx.x, cells = job.height * job.width;
    const Team team(block_threads, 1, shared_memory());
    double* factor = job.factor + sample * job.student_pixels;
    if (!job.takes(sample)) {
        for (int64_t p = team.rank; p < job.student_pixels; p += team.size) factor[p] = 0;
        if (team.rank == 0) job.values[sample] = 0;
        return;
    }
    double *a = job.student_cells + sample * cells, *b = job.teacher_cells + sample * cells;
    double square[2] = {0, 0};
    for (int64_t p = team.rank; p < cells; p += team.size) {
        a[p] = cell_mean(job.student_map + sample * job.student_pixels, job.student_shape, job.height, job.width, p);
        b[p] = cell_mean(job.teacher_map + sample * job.teacher_pixels, job.teacher_shape, job.height, job.width, p);
        square[0] += a[p] * a[p];
        square[1] += b[p] * b[p];
    }
    team.combine(square, Add(), 0);
    const double length_a = sqrt(square[0]), length_b = sqrt(square[1]);
    double sum[2] = {0, 0};
    for (int64_t p = team.rank; p < cells; p += team.size) {
        a[p] = length_a == 0 ? 0 : a[p] / length_a;
        b[p] = length_b == 0 ? 0 : b[p] / length_b;
        const double g = a[p] - b[p];
        sum[0] += g * g;
        sum[1] += a[p] * g;
    }
    team.combine(sum, Add(), 1);                        // and all of a and b are written
    if (team.rank == 0) job.values[sample] = sum[0] / double(cells);
    if (!job.grad) return;
    const double to_all = double(cells) * double(job.student_shape[0]);
    const double k = length_a == 0 ? 0 : job.grad_scale(sample) * 4 / (to_all * length_a);
    for (int64_t p = team.rank; p < job.student_pixels; p += team.size)
        factor[p] = pass_on(job.student_shape, job.height, job.width, p,
                            [&](int64_t cell) { return k * (a[cell] - b[cell] - a[cell] * sum[1]); });
}

template <class E>
KDLAB_KERNEL(block_threads) attention_gradient(const FeaturesJob job) {
    constexpr int V = 16 / sizeof(E);
    const E* s = static_cast<const E*>(job.student);
    E* grad = static_cast<E*>(job.grad);
    const int64_t count = job.samples * job.student_size, step = int64_t(gridDim.x) * block_threads;
    const int64_t first = int64_t(blockIdx.x) * block_threads + threadIdx.x;
    auto factor_of = [&](int64_t i) {
        return job.factor[i / job.student_size * job.student_pixels + i % job.student_pixels];
    };
    auto of = [&](double x, int64_t i) { return job.takes(i / job.student_size) ? x * factor_of(i) : 0; };
    const bool whole = job.student_pixels % V == 0 && aligned(s) && aligned(grad);
    KDLAB_AS_IT_IS
    for (int64_t p = first; whole && p < count / V; p += step) {
        const Pack<E> a = *pack_at(s + p * V);
        decltype(element(a, 0)) g[V];
        KDLAB_UNROLL
        for (int i = 0; i < V; ++i) g[i] = decltype(g[0] + 0)(of(double(element(a, i)), p * V + i));
        Pack<E> pack;
        assemble(g, &pack);
        store_once(pack_at(grad + p * V), pack);
    }
    KDLAB_AS_IT_IS
    for (int64_t i = first; !whole && i < count; i += step)
        from_real(decltype(to_real(*s))(of(double(to_real(s[i])), i)), grad + i);
}

// ---- on the host -------------------------------------------------------------------------------------------------
FeaturesJob job_of(const kdlab_features& a, double* workspace) {
    FeaturesJob job;
    static_cast<kdlab_features&>(job) = a;
    job.student_pixels = a.student_shape[1] * a.student_shape[2];
    job.teacher_pixels = a.teacher_shape[1] * a.teacher_shape[2];
    job.student_size = a.student_shape[0] * job.student_pixels;
    job.teacher_size = a.teacher_shape[0] * job.teacher_pixels;
    job.height = std::min(a.student_shape[1], a.teacher_shape[1]);
    job.width = std::min(a.student_shape[2], a.teacher_shape[2]);
    job.parts = int(std::max<int64_t>(1, std::min<int64_t>(most_parts, job.student_size / part_elements)));
    const int64_t cells = job.height * job.width, maps = a.loss == KDLAB_ATTENTION ? a.samples : 0;
    double** parts[] = {&job.count, &job.values, &job.sums, &job.student_map, &job.teacher_map, &job.student_cells,
                        &job.teacher_cells, &job.factor};
    const int64_t sizes[] = {1, a.samples, a.samples * job.parts * first_sums, maps * job.student_pixels,
                             maps * job.teacher_pixels, maps * cells, maps * cells, maps * job.student_pixels};
    for (int i = 0; i < 8; ++i) {
        *parts[i] = workspace;
        workspace += sizes[i];
    }
    return job;
}

template <class E>
const char* launch_features(const FeaturesJob& job, void* stream) {
    const int room = Team::bytes();
    const char* e = nullptr;
    if (job.loss != KDLAB_ATTENTION) {
        e = launch(sum_parts<E>, job.samples * job.parts, block_threads, room, 1, stream, job);
        return e ? e : launch(finish_parts<E>, job.samples * job.parts, block_threads, room, 1, stream, job);
    }
    auto tiles_of = [](int64_t pixels) { return (pixels + pixel_lanes - 1) / pixel_lanes; };
    const int64_t tiles = tiles_of(job.student_pixels) + tiles_of(job.teacher_pixels);
    e = launch(square_maps<E>, job.samples * tiles, block_threads, int(sizeof(double)) * block_threads, 1, stream, job);
    if (!e) e = launch(compare_maps, job.samples, block_threads, room, 1, stream, job);
    if (e || !job.grad) return e;
    const int64_t elements = job.samples * job.student_size;
    const int64_t blocks = std::min<int64_t>(1 << 16, (elements + 2047) / 2048);
    return launch(attention_gradient<E>, blocks, block_threads, 0, 1, stream, job);
}

const char* launch_any(const FeaturesJob& job, void* stream) {
    switch (job.dtype) {
        case KDLAB_F32: return launch_features<float>(job, stream);
        case KDLAB_F64: return launch_features<double>(job, stream);
        case KDLAB_BF16: return launch_features<bf16>(job, stream);
        default: return launch_features<f16>(job, stream);
    }
}

}  // namespace
}  // namespace kdlab

using namespace kdlab;

int64_t kdlab_cuda_feature_workspace(const kdlab_features* a) {
    const FeaturesJob job = job_of(*a, nullptr);
    const int64_t maps = a->loss == KDLAB_ATTENTION ? a->samples : 0;
    return 1 + a->samples * (1 + job.parts * first_sums) +
           maps * (2 * job.student_pixels + job.teacher_pixels + 2 * job.height * job.width);
}

const char* kdlab_features_cuda(const kdlab_features* a, const kdlab_cuda_place* place) {
    OnDevice on(place->device);
    if (on.error) return message(on.error);
    const FeaturesJob job = job_of(*a, place->workspace);
    const char* e = nullptr;
    if (job.mask && job.reduction == KDLAB_MEAN)
        e = launch(count_samples, 1, block_threads, Team::bytes(), 1, place->stream, job);
    const size_t element = a->dtype == KDLAB_F64 ? 8 : a->dtype == KDLAB_F32 ? 4 : 2;
    if (!e && a->samples && job.student_size && job.teacher_size) {
        e = launch_any(job, place->stream);
    } else if (!e) {                                            // nothing to compare: all is zero
        e = fill_zero(job.values, sizeof(double) * a->samples, place->stream);
        if (!e) e = fill_zero(job.grad, element * a->samples * job.student_size, place->stream);
    }
    return e || !job.out ? e : launch(reduce_samples, 1, block_threads, Team::bytes(), 1, place->stream, job);
}
