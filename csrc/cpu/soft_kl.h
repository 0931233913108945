// The entry of the softened divergences: dtype and terms to the right loop. Included once per instruction set.
namespace KDLAB_ISA {

template <int kKind, bool kCE, class E>
void soft_kl_rows(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.cols <= widest_narrow) NarrowRows<kKind, kCE, E>(job, scratch).run(begin, end);
    else WideRows<kKind, kCE, E>(job, end, scratch).run(begin);
}

template <int kKind, class E>
void divergence_as(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.ce) soft_kl_rows<kKind, true, E>(job, begin, end, scratch);
    else soft_kl_rows<kKind, false, E>(job, begin, end, scratch);
}

template <class E>
void soft_kl_as(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (!job.kl) return soft_kl_rows<only_cross_entropy, true, E>(job, begin, end, scratch);
    switch (job.kind) {
        case KDLAB_REVERSE_KL: return divergence_as<KDLAB_REVERSE_KL, E>(job, begin, end, scratch);
        case KDLAB_JSD: return divergence_as<KDLAB_JSD, E>(job, begin, end, scratch);
        case KDLAB_SKEW_KL: return divergence_as<KDLAB_SKEW_KL, E>(job, begin, end, scratch);
        case KDLAB_SKEW_REVERSE_KL: return divergence_as<KDLAB_SKEW_REVERSE_KL, E>(job, begin, end, scratch);
        case KDLAB_TOTAL_VARIATION: return divergence_as<KDLAB_TOTAL_VARIATION, E>(job, begin, end, scratch);
        case KDLAB_SOFT_CROSS_ENTROPY: return divergence_as<KDLAB_SOFT_CROSS_ENTROPY, E>(job, begin, end, scratch);
        default: return divergence_as<KDLAB_FORWARD_KL, E>(job, begin, end, scratch);
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
