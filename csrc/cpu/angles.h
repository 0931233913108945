// The angles of relational distillation. Included once per instruction set.
//
// For a side i-j, the loop runs over k in lanes. All that it adds up belongs to row i of the gradients, so threads share
// the rows out and nobody else writes there. A few rows i take turns at each j, while row j is in the cache.
namespace KDLAB_ISA {

struct Corner { double value, slope, inverse; };        // sums over k: of the loss, of c, of d loss / d n_ij

// The triples (i, j, k) of one i and j. With g the slope of smooth L1, c = g n_ij n_jk is d loss / d G_ik.
template <bool kGrad>
Corner corner(const kdlab_angles& a, int64_t i, int64_t j) {
    const int64_t B = a.count, ij = i * B + j, jj = j * B + j;
    const double *Gi = a.student + i * B, *Gj = a.student + j * B, *nj = a.student_inverse + j * B;
    const double *Hi = a.teacher + i * B, *Hj = a.teacher + j * B, *mj = a.teacher_inverse + j * B;
    double* out = kGrad ? a.grad + i * B : nullptr;
    const F64 rise_s = all<F64>(a.student[jj] - a.student[ij]), rise_t = all<F64>(a.teacher[jj] - a.teacher[ij]);
    const F64 nij = all<F64>(a.student_inverse[ij]), mij = all<F64>(a.teacher_inverse[ij]);
    const F64 zero = {}, one = all<F64>(1), half = all<F64>(0.5);
    F64 value = {}, slope = {}, inverse = {};
    auto step = [&](F64 gi, F64 gj, F64 n, F64 hi, F64 hj, F64 m) {
        F64 side = (gi - gj + rise_s) * n, d = side * nij - (hi - hj + rise_t) * m * mij;
        F64 g = min(max(d, -one), one);
        value = value + g * (d - half * g);
        inverse = inverse + g * side;
        F64 c = g * n * nij;
        slope = slope + c;
        return c;
    };
    const int64_t end = B - B % lanes<F64>;
    for (int64_t k = 0; k < end; k += lanes<F64>) {
        F64 c = step(load(Gi + k), load(Gj + k), load(nj + k), load(Hi + k), load(Hj + k), load(mj + k));
        if (kGrad) store(out + k, load(out + k) + c);
    }
    if (end < B) {
        const int n = static_cast<int>(B - end);
        auto part = [&](const double* p) { return load_part(p + end, n, zero); };
        F64 c = step(part(Gi), part(Gj), part(nj), part(Hi), part(Hj), part(mj));
        if (kGrad) store_part(out + end, n, part(out) + c);
    }
    return {sum_of(value), sum_of(slope), sum_of(inverse)};
}

// Rows [begin, end): their sums go to rows, and to slopes [count, count] the part of the gradient at G_ij and G_jj.
template <bool kGrad>
void angle_rows(const kdlab_angles& a, int64_t begin, int64_t end, double* rows, double* slopes) {
    const int64_t B = a.count, together = 8;
    if (kGrad) std::memset(a.grad + begin * B, 0, (end - begin) * B * sizeof(double));
    for (int64_t first = begin; first < end; first += together)
        for (int64_t j = 0; j < B; ++j)
            for (int64_t i = first; i < std::min(first + together, end); ++i) {
                const Corner x = corner<kGrad>(a, i, j);
                rows[i] += x.value;
                if (!kGrad) continue;
                slopes[i * B + j] = x.slope;
                a.grad_inverse[i * B + j] = 2 * x.inverse;      // once for ij, once for kj in the place of ij
            }
}

inline void angles(const kdlab_angles& a, int64_t begin, int64_t end, double* rows, double* slopes) {
    FlushDenormals flush;
    if (a.grad) angle_rows<true>(a, begin, end, rows, slopes);
    else angle_rows<false>(a, begin, end, rows, slopes);
}

}  // namespace KDLAB_ISA
