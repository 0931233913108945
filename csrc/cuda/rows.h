// What the kernels over rows of logits share: which rows count and what multiplies them, a row as its threads see it,
// and how rows are laid on threads.
#pragma once
#include <algorithm>
#include <cmath>

#include "../kdlab_cuda.h"
#include "softened.h"
#include "team.h"

namespace kdlab {

// Blocks of 128 threads, of which three or four fit a multiprocessor: one loads while others compute and write. 512
// where a block has a multiprocessor to itself: this bound leaves a thread 128 registers.
constexpr int block_threads = 128, most_threads = 512;

struct Number { double value; const double* at; };
KDLAB_DEVICE double get(const Number& x) { return x.at ? *x.at : x.value; }

// What every kernel of a call gets. The workspace: counts of rows, partial sums, values of rows.
struct RowsJob : kdlab_soft_kl {
    Number T_number, kl_number, ce_number, normalizer_number;
    bool t_squared, divergence, cross_entropy;
    double *counts, *parts, *values;
    int count_parts;                    // > 0: the mean divides by the rows that count, whose number these parts give
    int team, slices, room;             // threads and blocks a team; bytes of shared memory for one input

    KDLAB_DEVICE bool takes(int64_t r) const { return !(mask && !mask[r]) && !(target && target[r] == ignore_index); }

    // By whole warps
    KDLAB_DEVICE double denominator() const {
        if (reduction != KDLAB_MEAN) return 1;
        if (!count_parts) {
            const double n = get(normalizer_number);
            return n == n ? n : double(rows > 1 ? rows : 1);
        }
        double n = 0;
        for (int i = int(threadIdx.x) % warp_lanes; i < count_parts; i += warp_lanes) n += counts[i];
        for (int offset = warp_lanes / 2; offset; offset /= 2) n += shuffle_xor(0xffffffffu, n, offset);
        return n > 1 ? n : 1;
    }
};

// What the first thread of a row's team writes: first what is known before the divergence, then the divergence. In
// between the numbers lie in memory, not in registers.
struct RowValue {
    const RowsJob& job;
    const int64_t r;

    KDLAB_DEVICE double weight() const { return job.row_weight ? at(job.row_weight, job.loss_dtype, r) : 1; }
    KDLAB_DEVICE double kl_factor() const {
        const double T = get(job.T_number);
        return job.t_squared ? T * T : 1;
    }
    KDLAB_DEVICE int label() const {                        // -1 for one that is none of the classes
        const int64_t y = job.target[r];
        return y >= 0 && y < job.cols ? int(y) : -1;
    }
    // What multiplies the row's gradient before the weights of its terms
    KDLAB_DEVICE double grad_scale(double denominator) const {
        const double g = weight() / denominator;
        return job.grad_in ? g * at(job.grad_in, job.loss_dtype, job.reduction == KDLAB_NONE ? r : 0) : g;
    }
    KDLAB_DEVICE void begin(double ce, double kl) const {
        double value = 0;
        if (job.divergence) put(job.kl_rows, job.loss_dtype, r, kl * kl_factor());
        if (job.cross_entropy) put(job.ce_rows, job.loss_dtype, r, ce);
        if (job.divergence && get(job.kl_number) != 0) value += get(job.kl_number) * kl_factor() * kl;
        if (job.cross_entropy && get(job.ce_number) != 0) value += get(job.ce_number) * ce;
        job.values[r] = value * weight();
    }
    KDLAB_DEVICE void end(double kl) const {
        const double more = kl * kl_factor(), kl_weight = get(job.kl_number);
        if (job.kl_rows) put(job.kl_rows, job.loss_dtype, r, at(job.kl_rows, job.loss_dtype, r) + more);
        if (kl_weight != 0) job.values[r] += kl_weight * more * weight();
        give();
    }
    KDLAB_DEVICE void give() const {
        if (job.reduction == KDLAB_NONE) put(job.out, job.loss_dtype, r, job.values[r]);
    }
    KDLAB_DEVICE void nothing() const {
        put(job.kl_rows, job.loss_dtype, r, 0);
        put(job.ce_rows, job.loss_dtype, r, 0);
        job.values[r] = 0;
        give();
    }
};

template <class E> struct Arithmetic { typedef float type; };
template <> struct Arithmetic<double> { typedef double type; };
template <class E> constexpr bool exact = sizeof(E) == 4;

// A part of a row, as one block sees it
template <class E>
struct Slice {
    typedef typename Arithmetic<E>::type R;
    static constexpr int V = 16 / sizeof(E);

    const E *s, *t;                     // in memory
    E* grad;
    E *held_s, *held_t;                 // in shared memory
    int begin, n;                       // where it begins in the row, and how many elements it has
    int head, vectors;                  // elements before the first whole 16 bytes, and how many of these there are

    // Elements before the first 16-byte border
    static KDLAB_DEVICE int before_border(const E* p) {
        return int((16 - (reinterpret_cast<uintptr_t>(p) & 15)) % 16 / sizeof(E));
    }

    KDLAB_DEVICE Slice(const RowsJob& job, const Team& team, int64_t r, unsigned char* memory, int place) {
        s = static_cast<const E*>(job.student) + r * job.student_stride;
        t = job.divergence ? static_cast<const E*>(job.teacher) + r * job.teacher_stride : s;
        grad = job.grad ? static_cast<E*>(job.grad) + r * job.cols : nullptr;
        head = before_border(s);
        const bool together = before_border(t) == head && (!grad || before_border(grad) == head);
        if (!together || head > job.cols) head = int(job.cols);
        vectors = int(job.cols - head) / V;
        n = int(job.cols);
        begin = 0;
        if (team.slices > 1) share(team, together);
        unsigned char* own = memory + 2 * job.room * place;
        const int shift = (V - head % V) % V;                       // so that held vectors begin at 16 bytes, too
        held_s = reinterpret_cast<E*>(own) + shift;
        held_t = reinterpret_cast<E*>(own + job.room) + shift;
    }

    // This block's part: whole vectors, and the first and the last block take the odd elements.
    KDLAB_DEVICE void share(const Team& team, bool together) {
        const int first = head, unit = together ? V : 1, units = (n - (together ? head : 0)) / unit;
        auto cut = [&](int slice) {
            if (slice == 0) return 0;
            if (slice == team.slices) return n;
            return (together ? first : 0) + unit * int(int64_t(units) * slice / team.slices);
        };
        const int from = cut(team.slice), to = cut(team.slice + 1);
        begin = from;
        n = to - from;
        s += from;
        t += from;
        if (grad) grad += from;
        head = together ? (team.slice == 0 ? first : 0) : n;
        vectors = (n - head) / V;
    }

    // body(i, Width) for all vectors and odd elements of one thread
    template <class Body>
    KDLAB_DEVICE void each(const Team& team, Body body) const {
        KDLAB_AS_IT_IS
        for (int v = team.rank; v < vectors; v += team.size) body(head + v * V, Width<V>());
        odd(team, body);
    }
    template <class Body>
    KDLAB_DEVICE void odd(const Team& team, Body body) const {
        const int count = n - vectors * V;
        KDLAB_AS_IT_IS
        for (int j = team.rank; j < count; j += team.size) body(j < head ? j : j + vectors * V, Width<1>());
    }

    // body(i, s, t), one element after the other: for what is longer than the way to memory
    template <bool kHeld, class Body>
    KDLAB_DEVICE void each_one(const Team& team, Body body) const {
        KDLAB_AS_IT_IS
        for (int i = team.rank; i < n; i += team.size)
            body(i, R(to_real((kHeld ? held_s : s)[i])), R(to_real((kHeld ? held_t : t)[i])));
    }

    template <int N> struct Width { static constexpr int width = N; };

    template <int N>
    static KDLAB_DEVICE void widen(const E* p, R (&x)[N]) {
        if constexpr (N == 1) {
            x[0] = to_real(*p);
        } else {
            const Pack<E> pack = *pack_at(p);
            KDLAB_UNROLL
            for (int i = 0; i < N; ++i) x[i] = element(pack, i);
        }
    }

    template <bool kHeld, int N>
    KDLAB_DEVICE void read(int i, R (&a)[N], R (&b)[N]) const {
        widen((kHeld ? held_s : s) + i, a);
        widen((kHeld ? held_t : t) + i, b);
    }

    // The gradient of each element is what body(s, t, i) gives, from several loads at once; without a gradient it is only called.
    template <bool kHeld, class Body>
    KDLAB_DEVICE void rewrite(const Team& team, Body body) const {
        each(team, [&](int i, auto w) {
            constexpr int N = decltype(w)::width;
            R a[N], b[N];
            read<kHeld>(i, a, b);
            KDLAB_UNROLL
            for (int j = 0; j < N; ++j) a[j] = body(a[j], b[j], i + j);
            if (grad) write(i, a);
        });
    }

    // One of the row's logits, wherever it lies; NaN if it is none of the classes
    static KDLAB_DEVICE R logit(const void* matrix, int64_t stride, int64_t r, int i) {
        return i < 0 ? Real<R>::nan : R(to_real(static_cast<const E*>(matrix)[r * stride + i]));
    }

    template <int N>
    KDLAB_DEVICE void write(int i, const R (&g)[N]) const {
        if constexpr (N == 1) {
            from_real(g[0], grad + i);
        } else {
            Pack<E> pack;
            assemble(g, &pack);
            store_once(pack_at(grad + i), pack);
        }
    }

    template <bool kOnce>
    static KDLAB_DEVICE Pack<E> fetch(const E* p) {
        return kOnce ? load_once(pack_at(p)) : *pack_at(p);
    }

    // The first sweep, with several loads under way at once: the row into shared memory, look(s, t) at the largest of
    // some elements and then add(s, t, i) for them, a few at a time, from i on. kHides: the class `hidden` is -inf to
    // them. kTeacher: is there a teacher? (Not a question to ask here: the answer would wait for the load.)
    template <bool kHeld, bool kTeacher, bool kHides, class Look, class Add>
    KDLAB_DEVICE void sweep(const Team& team, int hidden, Look look, Add add) const {
        constexpr int ahead = sizeof(E) == 8 ? 2 : 4;
        constexpr R low = -Real<R>::infinity;
        hidden -= begin;
        KDLAB_AS_IT_IS
        for (int v = team.rank; v < vectors; v += ahead * team.size) {
            Pack<E> a[ahead], b[ahead];
            KDLAB_UNROLL
            for (int j = 0; j < ahead; ++j) {
                const int i = head + (v + j * team.size) * V;
                if (v + j * team.size >= vectors) continue;
                a[j] = fetch<kHeld>(s + i);
                if (kTeacher) b[j] = fetch<kHeld>(t + i);
                else b[j] = a[j];
            }
            R top_s = low, top_t = low;
            KDLAB_UNROLL
            for (int j = 0; j < ahead; ++j) {
                const int i = head + (v + j * team.size) * V;
                if (v + j * team.size >= vectors) continue;
                if (kHeld) {
                    keep(pack_at(held_s + i), a[j]);
                    keep(pack_at(held_t + i), b[j]);
                }
                if (kHides && unsigned(hidden - i) < unsigned(V)) {
                    hide(hidden - i, &a[j]);
                    hide(hidden - i, &b[j]);
                }
                top_s = larger(top_of(a[j]), top_s);
                top_t = larger(top_of(b[j]), top_t);
            }
            look(top_s, top_t);
            KDLAB_UNROLL
            for (int j = 0; j < ahead; ++j) {
                const int i = head + (v + j * team.size) * V;
                if (v + j * team.size >= vectors) continue;
                constexpr int few = V < 4 ? V : 4;
                KDLAB_UNROLL
                for (int l = 0; l < V; l += few) {
                    R x[few], y[few];
                    KDLAB_UNROLL
                    for (int m = 0; m < few; ++m) {
                        x[m] = element(a[j], l + m);
                        y[m] = element(b[j], l + m);
                    }
                    add(x, y, i + l);
                }
            }
        }
        odd(team, [&](int i, auto) {
            if (kHeld) {
                held_s[i] = s[i];
                held_t[i] = t[i];
            }
            const bool is_hidden = kHides && i == hidden;
            const R x[1] = {is_hidden ? low : R(to_real(s[i]))}, y[1] = {is_hidden ? low : R(to_real(t[i]))};
            look(x[0], y[0]);
            add(x, y, i);
        });
    }

    // One class of a pack becomes -inf.
    static KDLAB_DEVICE void hide(int place, Pack<E>* pack) {
        R x[V];
        KDLAB_UNROLL
        for (int i = 0; i < V; ++i) x[i] = i == place ? -Real<R>::infinity : element(*pack, i);
        assemble(x, pack);
    }
};

// The hard label of a row, and what the gradient takes from it
template <class R>
struct HardLabel {
    int label = -1;
    R factor = 0, own = 0;              // of exp(s - top); the gradient at the label

    KDLAB_DEVICE R gradient(R s, R top, bool is_label) const {
        return is_label ? own : exp2_of(power_of(s, top, R(log2_of_e))) * factor;
    }
};

// Calls body(team, part, value, denominator) for this thread's row. One that does not count becomes zeros.
template <class E, class Body>
KDLAB_DEVICE void take_row(const RowsJob& job, Body body) {
    unsigned char* memory = shared_memory();
    const Team team(job.team, job.slices, memory);
    const double denominator = job.denominator();
    const int teams = int(blockDim.x) / job.team;
    const int place = int(threadIdx.x) / job.team;
    const int64_t r = int64_t(blockIdx.x) / job.slices * teams + place;
    if (r >= job.rows) return;                                      // whole teams
    const Slice<E> part(job, team, r, memory + (teams > 1 ? 0 : Team::bytes()), place);
    const RowValue value = {job, r};
    if (job.takes(r)) return body(team, part, value, denominator);
    if (part.grad)
        part.each(team, [&](int i, auto w) {
            const typename Slice<E>::R zero[decltype(w)::width] = {};
            part.write(i, zero);
        });
    if (team.first()) value.nothing();
}

// The sums of all threads, relative to the largest logits of all; what they are, and in the end whether a class is
// excluded where the value becomes +inf
struct RowSums { double zs, zt, m, entropy, zh, zh_t; bool excludes; };

template <bool kHeld, class S, class E, class R>
KDLAB_DEVICE RowSums add_up(S& own, const Team& team, const Slice<E>& part, int hidden, const Softening<R>& f) {
    R top[2] = {own.max_s, own.max_t};
    team.combine(top, Larger(), 0);
    own.template raise<true>(top[0], top[1], f);
    double x[6] = {own.zs, own.zt, own.m, own.entropy, own.zh, own.teachers_zh()};
    team.combine(x, Add(), 1);
    RowSums sums = {x[0], x[1], x[2], x[3], x[4], x[5], false};
    if (size_of(x[2] + x[3]) < Real<double>::infinity) return sums;
    Careful<R> careful;
    part.template each_one<kHeld>(team, [&](int i, R s, R t) {
        if (part.begin + i != hidden) careful.add(s, t, own, f);
    });
    double again[3] = {careful.m, careful.entropy, double(careful.excludes)};
    team.combine(again, Add(), 4);
    sums.m = again[0];
    sums.entropy = again[1];
    sums.excludes = again[2] > 0;
    return sums;
}

// The teacher's entropy, without the label's class if there is one. Where another has most of the mass, from the rest:
// log Z_t would cancel.
template <bool kHeld, class E, class R, bool kExact>
KDLAB_DEVICE double entropy_of(const Team& team, const Slice<E>& part, const Row<R, kExact>& row, const RowSums& sums,
                               double T, int label) {
    if (!(sums.zt < 3)) return log(sums.zt) - sums.entropy / sums.zt * log_of_2;
    R others = 0, tops = 0, weighted = 0;
    part.template each_one<kHeld>(team, [&](int i, R, R t) {
        if (part.begin + i == label) return;
        const R e = row.exp(t, row.max_t);
        if (t < row.max_t) others += e;
        else tops += 1;
        if (e > 0) weighted = fused(e, t - row.max_t, weighted);
    });
    double x[3] = {others, tops, weighted};
    team.combine(x, Add(), 0);
    const double rest = x[0] + (x[1] - 1);
    return log1p(rest) - x[2] / (1 + rest) / T;
}

// ---- on the host -------------------------------------------------------------------------------------------------
inline int limit_shared = 0, limit_cluster = 0;        // 0: what the device has

// How rows are laid on threads
struct Plan {
    int threads, team, slices, room, shared;
    bool held;
};

inline int room_for(int64_t cols, int slices, int element) {
    const int v = 16 / element;
    return int((cols / slices + 5 * v) / v * 16);                   // a share, odd elements at both ends, and a shift
}

constexpr int short_row = 8 << 10, comfortable = 50 << 10;      // bytes; with these, four blocks fit a multiprocessor
constexpr int reserved = 1 << 10;                               // bytes that every block takes beside its own

inline Plan plan_for(int64_t cols, int element, const DeviceInfo& device) {
    const int64_t bytes = 2 * cols * element;
    const int most = limit_shared ? limit_shared : device.shared_bytes - Team::bytes();
    const int enough = std::min(most, comfortable);
    const int largest = limit_cluster ? std::min(limit_cluster, device.cluster) : device.cluster;
    Plan p = {block_threads, block_threads, 1, 0, 0, true};
    if (bytes <= std::min(most, short_row)) {
        for (p.team = 4; p.team < warp_lanes && p.team * 16 < cols * element;) p.team *= 2;
        p.room = room_for(cols, 1, element);
        p.shared = p.threads / p.team * 2 * p.room;
        return p;
    }
    auto needs = [&](int slices) { return 2 * int64_t(cols / slices * element + 128); };
    while (p.slices < largest && needs(p.slices) > enough) p.slices *= 2;
    if (needs(p.slices) > most) {
        p.held = false;
        p.slices = 1;
    } else {
        p.room = room_for(cols, p.slices, element);
    }
    p.shared = Team::bytes() + 2 * p.room;
    const int fit = p.held ? (device.shared_bytes + reserved) / (p.shared + reserved) : 1;     // a multiprocessor
    if (element < 8 && fit < 3) p.threads = p.team = fit == 2 ? most_threads / 2 : most_threads;
    return p;
}

// `held` and `again`: the kernel that keeps the row in shared memory, and the one that reads it a second time
template <class E>
const char* launch_rows(void (*held)(RowsJob), void (*again)(RowsJob), RowsJob& job, DeviceInfo device,
                        const kdlab_cuda_place& place) {
    Plan p = plan_for(job.cols, sizeof(E), device);
    while (p.slices > 1 && !cluster_fits(held, place.device, p.slices, p.threads, p.shared)) {
        device.cluster = p.slices / 2;
        p = plan_for(job.cols, sizeof(E), device);
    }
    job.team = p.team;
    job.slices = p.slices;
    job.room = p.room;
    const int64_t teams = p.threads / p.team, blocks = (job.rows + teams - 1) / teams * p.slices;
    return launch(p.held ? held : again, blocks, p.threads, p.shared, p.slices, place.stream, job);
}

// Calls f(element) with an element of the job's dtype, for its type
template <class F>
const char* with_dtype(int dtype, F f) {
    switch (dtype) {
        case KDLAB_F32: return f(float());
        case KDLAB_F64: return f(double());
        case KDLAB_BF16: return f(bf16());
        default: return f(f16());
    }
}

// Those that are in files of their own
const char* launch_decoupled(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place);
const char* launch_squares(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place);

}  // namespace kdlab
