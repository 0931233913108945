// grad *= factor, in place. Included once per instruction set.
namespace KDLAB_ISA {

template <class E>
void scale_as(const kdlab_scale& a, int64_t begin, int64_t end) {
    typedef VecOf<E> V;
    for (int64_t r = begin; r < end; ++r) {
        E* g = static_cast<E*>(a.grad) + r * a.cols;
        V f = all<V>(Real<V>(at(a.factor, a.factor_dtype, a.per_row ? r : 0)));
        int64_t i = 0, body = a.cols - a.cols % lanes<V>;
        for (; i < body; i += lanes<V>) store(g + i, load(g + i) * f);
        if (i < a.cols) {
            int n = static_cast<int>(a.cols - i);
            store_part(g + i, n, load_part(g + i, n, f) * f);
        }
    }
}

inline void scale(const kdlab_scale& a, int64_t begin, int64_t end) {
    FlushDenormals flush;
    switch (a.dtype) {
        case KDLAB_F32: return scale_as<float>(a, begin, end);
        case KDLAB_F64: return scale_as<double>(a, begin, end);
        case KDLAB_BF16: return scale_as<bf16>(a, begin, end);
        case KDLAB_F16: return scale_as<f16>(a, begin, end);
    }
}

}  // namespace KDLAB_ISA
