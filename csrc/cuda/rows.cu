// Softened divergences and cross-entropy of rows of logits: loss and gradient, each input read once.
//
// A team of threads takes a row: a few lanes where rows are short, a block, or a cluster of blocks that shares out a
// row too long for one. A first sweep over the row keeps it in shared memory and finds maxima and sums; the gradient is
// made from there. A row that fits nowhere is read a second time instead (kHeld = false).
#include <algorithm>
#include <cmath>

#include "../kdlab_cuda.h"
#include "softened.h"
#include "team.h"

namespace kdlab {
namespace {

// Blocks of 128 threads, of which four fit a multiprocessor: one loads while others compute and write. 512 where a
// block has a multiprocessor to itself: this bound leaves a thread 128 registers.
constexpr int block_threads = 128, most_threads = 512, sum_threads = 256;
constexpr int count_share = 4096, sum_share = 8192, most_parts = 128;

struct Number { double value; const double* at; };
KDLAB_DEVICE double get(const Number& x) { return x.at ? *x.at : x.value; }

KDLAB_DEVICE double at(const void* p, int dtype, int64_t i) {
    return dtype == KDLAB_F64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}
KDLAB_DEVICE void put(void* p, int dtype, int64_t i, double x) {
    if (!p) return;
    if (dtype == KDLAB_F64) static_cast<double*>(p)[i] = x;
    else static_cast<float*>(p)[i] = float(x);
}

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

// How many rows count: each block a part of them.
KDLAB_KERNEL(sum_threads) count_rows(const RowsJob job) {
    const Team team(sum_threads, 1, shared_memory());
    const int64_t begin = job.rows * blockIdx.x / job.count_parts, end = job.rows * (blockIdx.x + 1) / job.count_parts;
    double n[1] = {0};
    for (int64_t r = begin + team.rank; r < end; r += team.size) n[0] += job.takes(r);
    team.combine(n, Add(), 0);
    if (team.rank == 0) job.counts[blockIdx.x] = n[0];
}

// The values of the rows, added up in one fixed order: first in parts, if there are many, then the parts.
struct SumJob {
    RowsJob job;
    const double* x;
    int64_t count;
    int parts;                          // 1: this is the end
};
KDLAB_KERNEL(sum_threads) sum_rows(const SumJob sum) {
    const Team team(sum_threads, 1, shared_memory());
    const int64_t begin = sum.count * blockIdx.x / sum.parts, end = sum.count * (blockIdx.x + 1) / sum.parts;
    double total[1] = {0};
    for (int64_t r = begin + team.rank; r < end; r += team.size) total[0] += sum.x[r];
    team.combine(total, Add(), 0);
    const double denominator = sum.job.denominator();
    if (team.rank) return;
    if (sum.parts > 1) sum.job.parts[blockIdx.x] = total[0];
    else put(sum.job.out, sum.job.loss_dtype, 0, total[0] / denominator);
}

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

    // The first sweep: maxima and sums, and the row into shared memory. Several loads are under way at once.
    template <bool kCE, bool kHeld>
    KDLAB_DEVICE void sweep(const Team& team, int label, const Softening<R>& f, bool teacher, Sums<R>& sums) const {
        constexpr int ahead = sizeof(E) == 8 ? 2 : 4;
        auto place = [&](int i) { return label - begin - i; };
        KDLAB_AS_IT_IS
        for (int v = team.rank; v < vectors; v += ahead * team.size) {
            Pack<E> a[ahead], b[ahead];
            KDLAB_UNROLL
            for (int j = 0; j < ahead; ++j) {
                const int i = head + (v + j * team.size) * V;
                if (v + j * team.size >= vectors) continue;
                a[j] = fetch<kHeld>(s + i);
                b[j] = teacher ? fetch<kHeld>(t + i) : a[j];
            }
            KDLAB_UNROLL
            for (int j = 0; j < ahead; ++j) {
                const int i = head + (v + j * team.size) * V;
                if (v + j * team.size >= vectors) continue;
                if (kHeld) {
                    *pack_at(held_s + i) = a[j];
                    *pack_at(held_t + i) = b[j];
                }
                constexpr int few = V < 4 ? V : 4;
                KDLAB_UNROLL
                for (int l = 0; l < V; l += few) {
                    R x[few], y[few];
                    KDLAB_UNROLL
                    for (int m = 0; m < few; ++m) {
                        x[m] = element(a[j], l + m);
                        y[m] = element(b[j], l + m);
                    }
                    sums.template add<kCE>(x, y, place(i + l), f);
                }
            }
        }
        odd(team, [&](int i, auto) {
            if (kHeld) {
                held_s[i] = s[i];
                held_t[i] = t[i];
            }
            const R x[1] = {to_real(s[i])}, y[1] = {to_real(t[i])};
            sums.template add<kCE>(x, y, place(i), f);
        });
    }
};

// The hard label of a row, and what the gradient takes from it
template <class R>
struct HardLabel {
    int label = -1;
    R factor = 0, own = 0;              // of exp(a); the gradient at the label

    KDLAB_DEVICE R gradient(R a, bool is_label) const { return is_label ? own : exp2_of(a * R(log2_of_e)) * factor; }
};

// The second half of a row: closer sums where they are needed, and the gradient
template <class E, bool kCE, bool kHeld>
struct Finish {
    typedef Slice<E> S;
    typedef typename S::R R;
    const S& part;
    const Team& team;
    const Row<R, exact<E>>& row;
    const HardLabel<R>& hard;
    const RowValue& value;
    R factor;                           // of the divergence in the gradient; NaN where the row is spoilt
    bool first;                         // does this thread write the value?

    KDLAB_DEVICE R with_label(R g, R s, int i) const {
        return kCE ? g + hard.gradient(s - row.max_s, i == hard.label) : g;
    }

    // The gradient of the forward KL as it stands
    KDLAB_DEVICE void plain_gradient() const {
        const R fs = factor * row.ps, ft = factor * row.pt;
        part.each(team, [&](int i, auto w) {
            constexpr int N = decltype(w)::width;
            R s[N], t[N];
            part.template read<kHeld>(i, s, t);
            KDLAB_UNROLL
            for (int j = 0; j < N; ++j) {
                const R es = exp2_of((s[j] - row.max_s) * row.k), et = exp2_of((t[j] - row.max_t) * row.k);
                s[j] = with_label(fused(es, fs, -(et * ft)), s[j], part.begin + i + j);
            }
            part.write(i, s);
        });
    }

    KDLAB_DEVICE void cross_entropy_gradient() const {
        part.each(team, [&](int i, auto w) {
            constexpr int N = decltype(w)::width;
            R s[N], t[N];
            part.template read<kHeld>(i, s, t);
            KDLAB_UNROLL
            for (int j = 0; j < N; ++j) s[j] = with_label(0, s[j], part.begin + i + j);
            part.write(i, s);
        });
    }

    // This thread's share of the value, of the sum of the weighted slopes, and of the sum of all q
    template <int kKind, bool kClose>
    KDLAB_DEVICE void sums(double (&x)[3]) const {
        R total = 0;
        double slope = 0, all = 0;
        part.template each_one<kHeld>(team, [&](int, R s, R t) {
            const Pair<R> pair = compare<kClose>(s, t, row);
            total += value_of<kKind, kClose>(pair, row.mix);
            if (kKind == KDLAB_FORWARD_KL || kKind == KDLAB_REVERSE_KL) return;
            slope += weighted_slope<kKind, kClose>(pair, row.mix);
            all += double(pair.q);
        });
        x[0] = total;
        x[1] = slope;
        x[2] = all;
    }

    template <int kKind, bool kClose>
    KDLAB_DEVICE void gradient(const Slope<R>& slope) const {
        part.template each_one<kHeld>(team, [&](int i, R s, R t) {
            const R g = gradient_of<kKind, kClose>(compare<kClose>(s, t, row), slope, row.mix) * factor;
            from_real(with_label(g, s, part.begin + i), part.grad + i);
        });
    }

    // sum of p (e^w - 1), from which lambda comes in a close row
    KDLAB_DEVICE R mass() const {
        R sum = 0;
        part.template each_one<kHeld>(team, [&](int, R s, R t) { sum += row.mass(s, t); });
        double x[1] = {sum};
        team.combine(x, Add(), 2);
        return R(x[0]);
    }
};

// Calls f(Kind) with the divergence as a type
template <int k> struct Kind { static constexpr int kind = k; };

template <class F>
KDLAB_DEVICE void with_kind(int kind, F f) {
    switch (kind) {
        case KDLAB_REVERSE_KL: return f(Kind<KDLAB_REVERSE_KL>());
        case KDLAB_JSD: return f(Kind<KDLAB_JSD>());
        case KDLAB_SKEW_KL: return f(Kind<KDLAB_SKEW_KL>());
        case KDLAB_SKEW_REVERSE_KL: return f(Kind<KDLAB_SKEW_REVERSE_KL>());
        case KDLAB_TOTAL_VARIATION: return f(Kind<KDLAB_TOTAL_VARIATION>());
        default: return f(Kind<KDLAB_FORWARD_KL>());
    }
}

template <class R>
KDLAB_DEVICE void add_up(Sums<R>& own, const Team& team, const Softening<R>& f, double (&x)[6]) {
    R top[2] = {own.max_s, own.max_t};
    team.combine(top, Larger(), 0);
    own.template raise<true>(top[0], top[1], f);
    const double mine[6] = {own.zs, own.zt, own.m, own.entropy, own.zh, double(own.excludes)};
    for (int i = 0; i < 6; ++i) x[i] = mine[i];
    team.combine(x, Add(), 1);
}

template <class E, bool kCE, bool kHeld>
KDLAB_KERNEL((sizeof(E) == 8 ? block_threads : most_threads)) softened_rows(const RowsJob job) {
    typedef typename Arithmetic<E>::type R;
    unsigned char* memory = shared_memory();
    const Team team(job.team, job.slices, memory);
    const double denominator = job.denominator();
    const int teams = int(blockDim.x) / job.team;
    const int place = int(threadIdx.x) / job.team;
    const int64_t r = int64_t(blockIdx.x) / job.slices * teams + place;
    if (r >= job.rows) return;                                      // whole teams
    const Slice<E> part(job, team, r, memory + (teams > 1 ? 0 : Team::bytes()), place);
    const bool first = team.rank == 0 && team.slice == 0;
    const RowValue value = {job, r};

    if (!job.takes(r)) {
        if (part.grad)
            part.each(team, [&](int i, auto w) {
                const R zero[decltype(w)::width] = {};
                part.write(i, zero);
            });
        if (first) value.nothing();
        return;
    }

    // Sums
    const double T = get(job.T_number), nan = Real<double>::nan;
    const Softening<R> f(T, job.divergence ? job.kind : only_cross_entropy);
    HardLabel<R> hard;
    R label_logit = Real<R>::nan;                                   // for a label that is none of the classes
    if (kCE) {
        const int64_t label = job.target[r];
        if (label >= 0 && label < job.cols) {
            hard.label = int(label);
            label_logit = to_real(static_cast<const E*>(job.student)[r * job.student_stride + label]);
        }
    }
    Sums<R> own;
    part.template sweep<kCE, kHeld>(team, hard.label, f, job.divergence, own);
    double sum[6];
    add_up(own, team, f, sum);
    const double zs = sum[0] > 0 ? sum[0] : nan, zt = sum[1] > 0 ? sum[1] : nan;        // no class at all: NaN
    const bool spoilt = !(zs > 0 && zt > 0), excluded = f.unbounded() && sum[5] > 0;
    const bool no_way_out = spoilt || (excluded && f.reverse());    // +inf, and no step leads away
    Row<R, exact<E>> row(own.max_s, own.max_t, R(zs), R(zt), f, R(job.mix));

    // What multiplies the gradient
    double g = value.weight() / denominator;
    if (job.grad_in) g *= at(job.grad_in, job.loss_dtype, job.reduction == KDLAB_NONE ? r : 0);
    double ce = 0;
    if (kCE) {
        const R a = label_logit - own.max_s, h = exp2_of(a * R(log2_of_e));
        if (first) ce = spoilt ? nan : cross_entropy_of(h, sum[4], -double(a));
        hard.factor = R(g * get(job.ce_number) / (spoilt ? nan : h + sum[4]));
        hard.own = R(-sum[4]) * hard.factor;
    }
    if (first) {
        double kl = f.kind == KDLAB_SOFT_CROSS_ENTROPY ? log(zt) - sum[3] / zt / T : 0;     // the teacher's entropy
        if (excluded) kl = Real<double>::infinity;
        value.begin(ce, spoilt ? nan : kl);
    }
    if (f.kind == only_cross_entropy) {
        if (first) value.give();
        if (part.grad) Finish<E, kCE, kHeld>{part, team, row, hard, value, 0, first}.cross_entropy_gradient();
        team.leave();
        return;
    }

    // The divergence
    const R factor = no_way_out ? Real<R>::nan : R(g * get(job.kl_number) * value.kl_factor() / T);
    const Finish<E, kCE, kHeld> rest = {part, team, row, hard, value, factor, first};
    double x[3] = {kl_of(sum[2], zs, zt, T, f.reverse()), 0, 1};
    const bool close = sizeof(R) == 8 || is_close(R(x[0]), R(zs), R(zt), !f.unbounded());
    const bool known = f.unbounded() && !close;
    if (close) {
        const R m = rest.mass();
        if (size_of(m) < R(0.5)) row.lambda = log1p(m);
    }
    if (!known) {
        with_kind(f.kind, [&](auto k) {
            constexpr int kind = decltype(k)::kind;
            if (close) rest.template sums<kind, true>(x);
            else if constexpr (sizeof(R) == 4 && kind >= KDLAB_JSD) rest.template sums<kind, false>(x);
        });
        team.combine(x, Add(), 3);
    }
    if (first) value.end(x[0]);
    if (part.grad)
        with_kind(f.kind, [&](auto k) {
            constexpr int kind = decltype(k)::kind;
            const Slope<R> slope(kind == KDLAB_REVERSE_KL ? x[0] : x[1] / x[2]);     // by the q as they are rounded
            if (close) rest.template gradient<kind, true>(slope);
            else if constexpr (sizeof(R) == 4 && kind == KDLAB_FORWARD_KL) rest.plain_gradient();
            else if constexpr (sizeof(R) == 4) rest.template gradient<kind, false>(slope);
        });
    team.leave();
}

// ---- on the host -------------------------------------------------------------------------------------------------
int limit_shared = 0, limit_cluster = 0;        // 0: what the device has

// How rows are laid on threads
struct Plan {
    int threads, team, slices, room, shared;
    bool held;
};

int room_for(int64_t cols, int slices, int element) {
    const int v = 16 / element;
    return int((cols / slices + 5 * v) / v * 16);                   // a share, odd elements at both ends, and a shift
}

constexpr int short_row = 8 << 10, comfortable = 52 << 10;      // bytes; with these, four blocks fit a multiprocessor

Plan plan_for(int64_t cols, int element, const DeviceInfo& device) {
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
    if (needs(p.slices) > comfortable && element < 8) p.threads = p.team = most_threads;
    p.shared = Team::bytes() + 2 * p.room;
    return p;
}

template <class E, bool kCE>
const char* launch_rows(RowsJob& job, DeviceInfo device, const kdlab_cuda_place& place) {
    Plan p = plan_for(job.cols, sizeof(E), device);
    while (p.slices > 1 && !cluster_fits(softened_rows<E, kCE, true>, place.device, p.slices, p.threads, p.shared)) {
        device.cluster = p.slices / 2;
        p = plan_for(job.cols, sizeof(E), device);
    }
    job.team = p.team;
    job.slices = p.slices;
    job.room = p.room;
    const int64_t teams = p.threads / p.team, blocks = (job.rows + teams - 1) / teams * p.slices;
    auto kernel = p.held ? softened_rows<E, kCE, true> : softened_rows<E, kCE, false>;
    return launch(kernel, blocks, p.threads, p.shared, p.slices, place.stream, job);
}

template <class E>
const char* launch_as(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    return job.cross_entropy ? launch_rows<E, true>(job, device, place) : launch_rows<E, false>(job, device, place);
}

const char* launch_any(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    switch (job.dtype) {
        case KDLAB_F32: return launch_as<float>(job, device, place);
        case KDLAB_F64: return launch_as<double>(job, device, place);
        case KDLAB_BF16: return launch_as<bf16>(job, device, place);
        default: return launch_as<f16>(job, device, place);
    }
}

int parts_of(int64_t rows, int share) { return int(std::min<int64_t>(most_parts, (rows + share - 1) / share)); }

// The values of the rows into `out`: added up, if there is a reduction
const char* reduce(const RowsJob& job, void* stream) {
    SumJob sum = {job, job.values, job.rows, std::max(1, parts_of(job.rows, sum_share))};
    if (const char* e = launch(sum_rows, sum.parts, sum_threads, Team::bytes(), 1, stream, sum)) return e;
    if (sum.parts == 1) return nullptr;
    sum.x = job.parts;
    sum.count = sum.parts;
    sum.parts = 1;
    return launch(sum_rows, 1, sum_threads, Team::bytes(), 1, stream, sum);
}

}  // namespace
}  // namespace kdlab

using namespace kdlab;

int64_t kdlab_cuda_workspace(int64_t rows) { return 2 * most_parts + rows; }

void kdlab_cuda_limits(int shared_bytes, int cluster) {
    limit_shared = shared_bytes;
    limit_cluster = cluster;
}

const char* kdlab_rows_cuda(const kdlab_cuda_rows* a) {
    const kdlab_cuda_place& place = a->place;
    OnDevice on(place.device);
    if (on.error) return message(on.error);
    RowsJob job;
    static_cast<kdlab_soft_kl&>(job) = a->rows;
    job.kind = kdlab_kind_at_ends(job.kind, job.mix);
    if (job.cols > INT32_MAX / 16) return "too many classes for the CUDA kernels";
    job.T_number = {job.T, a->T};
    job.kl_number = {job.kl_weight, a->kl_weight};
    job.ce_number = {job.ce_weight, a->ce_weight};
    job.normalizer_number = {job.normalizer, a->normalizer};
    job.t_squared = a->t_squared;
    job.divergence = job.teacher && (job.kl_weight != 0 || a->kl_weight || job.kl_rows);
    job.cross_entropy = job.target && (job.ce_weight != 0 || a->ce_weight || job.ce_rows);
    job.counts = place.workspace;
    job.parts = job.counts + most_parts;
    job.values = job.parts + most_parts;

    const bool counted = job.reduction == KDLAB_MEAN && !a->normalizer && std::isnan(job.normalizer) &&
                         (job.mask || job.target) && job.rows > 0;
    job.count_parts = counted ? parts_of(job.rows, count_share) : 0;
    const char* e = nullptr;
    if (counted) e = launch(count_rows, job.count_parts, sum_threads, Team::bytes(), 1, place.stream, job);
    if (e) return e;

    const size_t number = job.loss_dtype == KDLAB_F64 ? 8 : 4;
    const size_t element = job.dtype == KDLAB_F64 ? 8 : job.dtype == KDLAB_F32 ? 4 : 2;
    if (job.rows == 0 || job.cols == 0 || !(job.divergence || job.cross_entropy)) {      // nothing to compute: all zero
        if (job.reduction == KDLAB_NONE) e = fill_zero(job.out, number * job.rows, place.stream);
        else e = fill_zero(job.values, 8 * job.rows, place.stream);
        if (!e) e = fill_zero(job.kl_rows, number * job.rows, place.stream);
        if (!e) e = fill_zero(job.ce_rows, number * job.rows, place.stream);
        if (!e) e = fill_zero(job.grad, element * job.rows * job.cols, place.stream);
    } else {
        e = launch_any(job, device_info(place.device), place);
    }
    return e || job.reduction == KDLAB_NONE || !job.out ? e : reduce(job, place.stream);
}

// ---- the gradient times a factor -----------------------------------------------------------------------------------
namespace kdlab {
namespace {

template <class E>
KDLAB_KERNEL(sum_threads) scale_rows(const kdlab_scale job) {
    typedef typename Arithmetic<E>::type R;
    const R whole = R(at(job.factor, job.factor_dtype, 0));
    if (!job.per_row && whole == 1) return;
    constexpr int V = 16 / sizeof(E);
    E* grad = static_cast<E*>(job.grad);
    const int64_t count = job.rows * job.cols, step = int64_t(gridDim.x) * blockDim.x;
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, packs = job.per_row ? 0 : count / V;
    for (int64_t i = first; i < packs; i += step) {
        Pack<E> pack = *pack_at(grad + i * V);
        R x[V];
        KDLAB_UNROLL
        for (int j = 0; j < V; ++j) x[j] = element(pack, j) * whole;
        assemble(x, &pack);
        *pack_at(grad + i * V) = pack;
    }
    for (int64_t i = packs * V + first; i < count; i += step) {
        const R factor = job.per_row ? R(at(job.factor, job.factor_dtype, i / job.cols)) : whole;
        from_real(to_real(grad[i]) * factor, grad + i);
    }
}

template <class E>
const char* scale_as(const kdlab_scale& a, const kdlab_cuda_place& place) {
    const int64_t blocks = std::min<int64_t>(4096, (a.rows * a.cols + 4095) / 4096);
    return blocks ? launch(scale_rows<E>, blocks, sum_threads, 0, 1, place.stream, a) : nullptr;
}

}  // namespace
}  // namespace kdlab

const char* kdlab_scale_cuda(const kdlab_scale* a, const kdlab_cuda_place* place) {
    OnDevice on(place->device);
    if (on.error) return message(on.error);
    switch (a->dtype) {
        case KDLAB_F32: return scale_as<float>(*a, *place);
        case KDLAB_F64: return scale_as<double>(*a, *place);
        case KDLAB_BF16: return scale_as<bf16>(*a, *place);
        default: return scale_as<f16>(*a, *place);
    }
}
