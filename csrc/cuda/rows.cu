// Softened divergences and cross-entropy of rows of logits: loss and gradient, each input read once.
//
// A team of threads takes a row: a few lanes where rows are short, a block, or a cluster of blocks that shares out a
// row too long for one. A first sweep over the row keeps it in shared memory and finds maxima and sums; the gradient is
// made from there. A row that fits nowhere is read a second time instead (kHeld = false).
#include "rows.h"

namespace kdlab {
namespace {

constexpr int sum_threads = 256, count_share = 4096, sum_share = 8192, most_parts = 128;

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
        return kCE ? g + hard.gradient(s, row.max_s, i == hard.label) : g;
    }

    // The gradient of the forward KL as it stands
    KDLAB_DEVICE void plain_gradient() const {
        const R fs = factor * row.ps, ft = factor * row.pt;
        part.template rewrite<kHeld>(team, [&](R s, R t, int i) {
            const R es = exp2_of(power_of(s, row.max_s, row.k)), et = exp2_of(power_of(t, row.max_t, row.k));
            return with_label(fused(es, fs, -(et * ft)), s, part.begin + i);
        });
    }

    KDLAB_DEVICE void cross_entropy_gradient() const {
        part.template rewrite<kHeld>(team, [&](R s, R, int i) { return with_label(0, s, part.begin + i); });
    }

    // This thread's share of the value, of the sum of the weighted slopes, and of the sum of all q
    template <int kKind, bool kClose>
    KDLAB_DEVICE void sums(double (&x)[3]) const {
        R total = 0;
        double slope = 0, all = 0;
        part.template each_one<kHeld>(team, [&](int, R s, R t) {
            const Pair<R> pair = compare<kClose>(s, t, row);
            if constexpr (kKind == KDLAB_FORWARD_KL || kKind == KDLAB_REVERSE_KL) {
                total += value_of<kKind, kClose>(pair, row.mix);
                return;
            }
            Share<R> share;
            if constexpr (kClose) share = {value_of<kKind, true>(pair, row.mix), slope_of<kKind, true>(pair, row.mix)};
            else share = plain_share_of<kKind>(pair, row.mix);
            total += share.value;
            slope += weighted_slope(pair.q, share.slope);
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

// The same with one that has the same sums
template <bool kCE, class F>
KDLAB_DEVICE void with_sweep(int kind, F f) {
    switch (kind) {
        case only_cross_entropy:
            if constexpr (kCE) f(Kind<only_cross_entropy>());
            return;
        case KDLAB_REVERSE_KL: return f(Kind<KDLAB_REVERSE_KL>());
        case KDLAB_SOFT_CROSS_ENTROPY: return f(Kind<KDLAB_SOFT_CROSS_ENTROPY>());
        default: return f(Kind<KDLAB_FORWARD_KL>());
    }
}

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

template <class E, bool kCE, bool kHeld>
KDLAB_KERNEL((sizeof(E) == 8 ? block_threads : most_threads)) softened_rows(const RowsJob job) {
    take_row<E>(job, [&](const Team& team, const Slice<E>& part, const RowValue& value, double denominator) {
        typedef typename Arithmetic<E>::type R;
        const bool first = team.first();

        // Sums
        const double T = get(job.T_number), nan = Real<double>::nan;
        const Softening<R> f(T, job.divergence ? job.kind : only_cross_entropy);
        HardLabel<R> hard;
        if (kCE) hard.label = value.label();
        const R label_logit = kCE ? part.logit(job.student, job.student_stride, value.r, hard.label) : 0;
        Sums<R> own;
        with_sweep<kCE>(f.kind, [&](auto k) {
            part.template sweep<kHeld, decltype(k)::kind != only_cross_entropy, false>(team, -1,
                [&](R s, R t) { own.template look<kCE>(s, t, f); },
                [&](const auto& s, const auto& t, int i) {
                    own.template add<decltype(k)::kind, kCE>(s, t, hard.label - part.begin - i, f);
                });
        });
        const RowSums sums = add_up<kHeld>(own, team, part, -1, f);
        const double zs = sums.zs > 0 ? sums.zs : nan, zt = sums.zt > 0 ? sums.zt : nan;    // no class at all: NaN
        const bool spoilt = !(zs > 0 && zt > 0), excluded = f.unbounded() && sums.excludes;
        const bool no_way_out = spoilt || (excluded && f.reverse());    // +inf, and no step leads away
        Row<R, exact<E>> row(own.max_s, own.max_t, R(zs), R(zt), f, job.mix);

        // What multiplies the gradient
        const double g = value.grad_scale(denominator);
        double ce = 0;
        if (kCE) {
            const R h = exp2_of(power_of(label_logit, own.max_s, R(log2_of_e)));
            if (first) ce = cross_entropy_of(h, sums.zh, double(own.max_s) - double(label_logit));
            hard.factor = R(g * get(job.ce_number) / (h + sums.zh));
            hard.own = R(-sums.zh) * hard.factor;
        }
        double kl = 0;
        if (f.kind == KDLAB_SOFT_CROSS_ENTROPY) kl = entropy_of<kHeld>(team, part, row, sums, T, -1);
        if (first) value.begin(ce, spoilt ? nan : excluded ? Real<double>::infinity : kl);
        if (f.kind == only_cross_entropy) {
            if (first) value.give();
            if (part.grad) Finish<E, kCE, kHeld>{part, team, row, hard, value, 0, first}.cross_entropy_gradient();
            team.leave();
            return;
        }

        // The divergence
        const R factor = no_way_out ? Real<R>::nan : R(g * get(job.kl_number) * value.kl_factor() / T);
        const Finish<E, kCE, kHeld> rest = {part, team, row, hard, value, factor, first};
        double x[3] = {kl_of(sums.m, zs, zt, f.reverse()), 0, 1};
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
    });
}

template <class E, bool kCE>
const char* launch_softened(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    return launch_rows<E>(softened_rows<E, kCE, true>, softened_rows<E, kCE, false>, job, device, place);
}

const char* launch_any(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    if (job.divergence && kdlab_kind_has_label(job.kind)) return launch_decoupled(job, device, place);
    if (job.divergence && job.kind == KDLAB_LOGIT_MSE) return launch_squares(job, device, place);
    return with_dtype(job.dtype, [&](auto e) {
        typedef decltype(e) E;
        return job.cross_entropy ? launch_softened<E, true>(job, device, place)
                                 : launch_softened<E, false>(job, device, place);
    });
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
    job.divergence = job.teacher && (job.kl_weight != 0 || a->kl_weight || job.kl_rows) &&
                     (job.target || !kdlab_kind_has_label(job.kind));
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
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t packs = job.per_row || reinterpret_cast<uintptr_t>(grad) % 16 ? 0 : count / V;
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
