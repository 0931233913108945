// DKD and NKD of rows of logits, with cross-entropy in the same sweep: as in rows.cu, with the label's class set apart.
#include "decoupled.h"
#include "rows.h"

namespace kdlab {
namespace {

template <class E, int kKind, bool kCE, bool kHeld>
KDLAB_KERNEL((sizeof(E) == 8 ? block_threads : most_threads)) decoupled_rows(const RowsJob job) {
    take_row<E>(job, [&](const Team& team, const Slice<E>& part, const RowValue& value, double denominator) {
        typedef typename Arithmetic<E>::type R;
        constexpr bool kNKD = kKind == KDLAB_NKD;
        constexpr R low = -Real<R>::infinity;
        constexpr double nan = Real<double>::nan, infinity = Real<double>::infinity;
        const bool first = team.first();

        // Sums over the other classes
        const double T = get(job.T_number);
        const Softening<R> f(T, kNKD ? KDLAB_SOFT_CROSS_ENTROPY : KDLAB_FORWARD_KL);
        HardLabel<R> hard;
        hard.label = value.label();
        const R own_s = part.logit(job.student, job.student_stride, value.r, hard.label);
        const R own_t = part.logit(job.teacher, job.teacher_stride, value.r, hard.label);
        OthersSums<R, kNKD> own;
        part.template sweep<kHeld, true, true>(team, hard.label,
            [&](R s, R t) { own.template look<kCE>(s, t, f); },
            [&](const auto& s, const auto& t, int) { own.template add<kCE>(s, t, f); });
        const RowSums sums = add_up<kHeld>(own, team, part, hard.label, f);
        const bool alone = sums.zs == 0 && sums.zt == 0;            // no other class: nothing to compare
        const double zs = alone ? 1 : sums.zs > 0 ? sums.zs : nan, zt = alone ? 1 : sums.zt > 0 ? sums.zt : nan;
        const bool spoilt = !(zs > 0 && zt > 0);
        const double above_s = double(own_s) - double(own.max_s), above_t = double(own_t) - double(own.max_t);
        Row<R, exact<E>> row(own.max_s, own.max_t, R(zs), R(zt), f, 0);

        // The hard label, and in NKD the soft one
        const double g = value.grad_scale(denominator);
        double ce = 0, known = 0;
        if (kCE) {
            const double others = sums.zh, odds = log(others) - above_s, spoil = above_s < infinity ? 0 : nan;
            double weight = get(job.ce_number);
            ce = softplus(odds) + spoil;
            if (kNKD) {
                const double p = probability_of_label(above_t, sums.zh_t);
                weight += get(job.kl_number) * p;
                known = p == 0 ? 0 : p * ce / value.kl_factor();
            }
            const double factor = g * weight / (others == 0 ? 1 : others * (1 + exp(-odds)) + spoil);
            hard.factor = R(factor);
            hard.own = R(-others * factor);
        }
        if (kNKD && !alone) known += job.others * entropy_of<kHeld>(team, part, row, sums, T, hard.label);
        if (first) value.begin(ce, known);

        // The KL of the others
        double kl[1] = {kl_of(sums.m, zs, zt, false)};
        const double l_t = above_t / T - log(zt);
        double l_s = above_s / T - log(zs), D = l_s - l_t;
        const bool close = sizeof(R) == 8 || is_close(R(kl[0]), R(zs), R(zt), false);
        auto each_other = [&](auto body) {
            part.template each_one<kHeld>(team, [&](int i, R s, R t) {
                const bool is_label = part.begin + i == hard.label;
                body(i, s, is_label ? low : s, is_label ? low : t, is_label);
            });
        };
        if (close) {
            R sum_mass = 0, sum_kl = 0;
            each_other([&](int, R, R s, R t, bool) { sum_mass += row.mass(s, t); });
            double mass[1] = {sum_mass};
            team.combine(mass, Add(), 2);
            double lambda = log(zs / zt);
            if (size_of(mass[0]) < 0.5) {
                lambda = log1p(mass[0]);
                row.lambda = R(lambda);
            }
            each_other([&](int, R, R s, R t, bool) {
                sum_kl += value_of<KDLAB_FORWARD_KL, true>(compare<true>(s, t, row), row.mix);
            });
            kl[0] = sum_kl;
            team.combine(kl, Add(), 3);
            const double apart = double(own_s) - double(own_t), tops = double(own.max_s) - double(own.max_t);
            if (size_of(apart) < infinity) {
                D = (apart - tops) / T - lambda;
                l_s = l_t + D;
            }
        }

        // The label or not
        const double nothing = own_s < infinity && own_t < infinity ? 0 : nan;
        Coin coin = {0, nothing};
        if (kNKD) coin.value = own_s == low && own_t > low ? infinity : 0;              // however small p_y is
        else if (!alone) coin = toss(l_s, l_t, D);
        if (alone) coin.value = coin.slope = size_of(own_s) < infinity && size_of(own_t) < infinity ? 0 : nan;
        const double alpha = kNKD ? 1 : job.mix;
        if (first) {
            const double others = spoilt ? nan : sums.excludes ? infinity : kl[0];
            const double of_label = alpha == 0 ? 0 : alpha * coin.value;                // a part of weight 0 is not there
            value.end(of_label + coin.slope * 0 + (job.others == 0 ? (spoilt ? nan : 0) : job.others * others));
        }
        if (!part.grad) return team.leave();

        const R factor = spoilt ? Real<R>::nan : R(g * get(job.kl_number) * value.kl_factor() / T);
        const R pull = R(alpha * coin.slope), beta = R(job.others), at_label = factor * pull;
        auto with_label = [&](R soft, R s, bool is_label) {
            const R g = is_label ? at_label : soft;
            return kCE ? g + hard.gradient(s, row.max_s, is_label) : g;
        };
        if (close) {
            each_other([&](int i, R logit, R s, R t, bool is_label) {
                const Pair<R> x = compare<true>(s, t, row);
                from_real(with_label(factor * fused(beta, x.d, -(pull * x.q)), logit, is_label), part.grad + i);
            });
        } else if constexpr (sizeof(R) == 4) {
            const R fs = factor * (beta - pull) * row.ps, ft = factor * beta * row.pt;
            part.template rewrite<kHeld>(team, [&](R s, R t, int i) {
                const R es = exp2_of(power_of(s, row.max_s, row.k)), et = exp2_of(power_of(t, row.max_t, row.k));
                return with_label(fused(es, fs, -(et * ft)), s, part.begin + i == hard.label);
            });
        }
        team.leave();
    });
}

template <class E, int kKind, bool kCE>
const char* launch_as(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    return launch_rows<E>(decoupled_rows<E, kKind, kCE, true>, decoupled_rows<E, kKind, kCE, false>, job, device,
                          place);
}

}  // namespace

const char* launch_decoupled(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    return with_dtype(job.dtype, [&](auto e) {
        typedef decltype(e) E;
        if (job.kind == KDLAB_NKD) return launch_as<E, KDLAB_NKD, true>(job, device, place);
        return job.cross_entropy ? launch_as<E, KDLAB_DKD, true>(job, device, place)
                                 : launch_as<E, KDLAB_DKD, false>(job, device, place);
    });
}

}  // namespace kdlab
