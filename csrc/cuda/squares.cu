// logit_mse of rows of logits, with cross-entropy in the same sweep: as in rows.cu, without exponentials of its own.
#include "decoupled.h"
#include "rows.h"
#include "squares.h"

namespace kdlab {
namespace {

template <class E, bool kCE, bool kHeld>
KDLAB_KERNEL((sizeof(E) == 8 ? block_threads : most_threads)) squared_rows(const RowsJob job) {
    take_row<E>(job, [&](const Team& team, const Slice<E>& part, const RowValue& value, double denominator) {
        typedef typename Arithmetic<E>::type R;
        constexpr double nan = Real<double>::nan, infinity = Real<double>::infinity;
        const bool first = team.first(), centred = job.mix != 0;

        // Sums, relative to the first class
        HardLabel<R> hard;
        if (kCE) hard.label = value.label();
        const R label_logit = kCE ? part.logit(job.student, job.student_stride, value.r, hard.label) : 0;
        double from = double(part.logit(job.student, job.student_stride, value.r, 0)) -
                      double(part.logit(job.teacher, job.teacher_stride, value.r, 0));
        if (!centred || !(size_of(from) < infinity)) from = 0;
        const Shift<R> start(from);
        SquareSums<R> own;
        part.template sweep<kHeld, true, false>(team, -1,
            [&](R s, R) { if (kCE && s > own.max_s) own.raise(s); },
            [&](const auto& s, const auto& t, int i) {
                own.template add<kCE>(s, t, hard.label - part.begin - i, start);
            });
        R top[1] = {own.max_s};
        if (kCE) {
            team.combine(top, Larger(), 0);
            own.raise(top[0]);
        }
        double sum[4] = {own.sum, own.apart, own.absent, own.zh};
        team.combine(sum, Add(), 1);

        // The mean; and what it takes from the others where the value is infinite
        const double n = double(job.cols) - sum[2];
        const Shift<R> mean(centred && n > 0 ? double(start.high) + double(start.low) + sum[0] / n : 0);
        const R pull = !centred || (sum[1] == 0 && size_of(sum[0]) < infinity) ? 0 : R(sum[1] + sum[0] * 0);

        const double g = value.grad_scale(denominator);
        double ce = 0;
        if (kCE) {
            const double others = sum[3], odds = log(others) - (double(label_logit) - double(own.max_s));
            const double spoil = label_logit < infinity ? 0 : nan;
            const double factor = g * get(job.ce_number) / (others == 0 ? 1 : others * (1 + exp(-odds)) + spoil);
            ce = softplus(odds) + spoil;
            hard.factor = R(factor);
            hard.own = R(-others * factor);
        }
        if (first) value.begin(ce, 0);

        // Value and gradient
        const R factor = R(2 * g * get(job.kl_number) * value.kl_factor());
        R square = 0;
        part.template rewrite<kHeld>(team, [&](R s, R t, int i) {
            const Excluded by = excluded(s, t);
            const R y = by == Excluded::by_both ? 0 : shifted(s, t, mean);
            square = fused(y, y, square);
            const R slope = factor * (by == Excluded::by_none ? y - pull : y);
            return kCE ? slope + hard.gradient(s, own.max_s, part.begin + i == hard.label) : slope;
        });
        double total[1] = {square};
        team.combine(total, Add(), 2);
        if (first) value.end(total[0]);
        team.leave();
    });
}

template <class E, bool kCE>
const char* launch_as(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    return launch_rows<E>(squared_rows<E, kCE, true>, squared_rows<E, kCE, false>, job, device, place);
}

}  // namespace

const char* launch_squares(RowsJob& job, const DeviceInfo& device, const kdlab_cuda_place& place) {
    return with_dtype(job.dtype, [&](auto e) {
        typedef decltype(e) E;
        return job.cross_entropy ? launch_as<E, true>(job, device, place) : launch_as<E, false>(job, device, place);
    });
}

}  // namespace kdlab
