// The entry of the softened KL: dtype and terms to the right loop. Included once per instruction set.
namespace KDLAB_ISA {

template <bool kKL, bool kCE, class E>
void soft_kl_rows(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.cols <= widest_narrow) NarrowRows<kKL, kCE, E>(job, scratch).run(begin, end);
    else WideRows<kKL, kCE, E>(job, end, scratch).run(begin);
}

template <class E>
void soft_kl_as(const Job& job, int64_t begin, int64_t end, void* scratch) {
    if (job.kl && job.ce) soft_kl_rows<true, true, E>(job, begin, end, scratch);
    else if (job.kl) soft_kl_rows<true, false, E>(job, begin, end, scratch);
    else soft_kl_rows<false, true, E>(job, begin, end, scratch);
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
