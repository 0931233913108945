// The entry of the softened divergences: dtype and terms to the right loop. Included once per instruction set.
namespace KDLAB_ISA {

template <int kSweep, class E>
void wide_rows(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.ce) WideRows<kSweep, true, E>(job, end, scratch).run(begin);
    else WideRows<kSweep, false, E>(job, end, scratch).run(begin);
}

// DKD with hardly any NCKD, which may need more digits than lanes have
inline bool mostly_tckd(const Job& job) {
    return job.kl && job.kind == KDLAB_DKD && std::fabs(job.others) < 0.1 * std::fabs(job.mix);
}

template <class E>
void soft_kl_as(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.kl && job.kind == KDLAB_LOGIT_MSE) {
        wide_rows<KDLAB_LOGIT_MSE, E>(job, begin, end, scratch);
    } else if (job.cols <= widest_narrow && !mostly_tckd(job)) {
        if (job.kl && job.ce) NarrowRows<true, true, E>(job, scratch).run(begin, end);
        else if (job.kl) NarrowRows<true, false, E>(job, scratch).run(begin, end);
        else NarrowRows<false, true, E>(job, scratch).run(begin, end);
    } else if (!job.kl) {
        WideRows<only_cross_entropy, true, E>(job, end, scratch).run(begin);
    } else {
        switch (job.kind) {
            case KDLAB_REVERSE_KL: return wide_rows<KDLAB_REVERSE_KL, E>(job, begin, end, scratch);
            case KDLAB_DKD: return wide_rows<KDLAB_DKD, E>(job, begin, end, scratch);
            case KDLAB_NKD: return WideRows<KDLAB_NKD, true, E>(job, end, scratch).run(begin);
            case KDLAB_SOFT_CROSS_ENTROPY: return wide_rows<KDLAB_SOFT_CROSS_ENTROPY, E>(job, begin, end, scratch);
            case KDLAB_JSD: case KDLAB_SKEW_KL: case KDLAB_SKEW_REVERSE_KL:
                return wide_rows<KDLAB_JSD, E>(job, begin, end, scratch);
            default: return wide_rows<KDLAB_FORWARD_KL, E>(job, begin, end, scratch);
        }
    }
}

inline void soft_kl(const Job& job, int64_t begin, int64_t end, void* scratch) {
    FlushDenormals flush;
    switch (job.dtype) {
        case KDLAB_F32: return soft_kl_as<float>(job, begin, end, scratch);
        case KDLAB_F64: return soft_kl_as<double>(job, begin, end, scratch);
        case KDLAB_BF16: return soft_kl_as<bf16>(job, begin, end, scratch);
        case KDLAB_F16: return soft_kl_as<f16>(job, begin, end, scratch);
    }
}

}  // namespace KDLAB_ISA
