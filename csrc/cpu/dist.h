// DIST: 1 - Pearson correlation of probabilities, over rows and over columns. Included once per instruction set.
//
// With the moments of p (student) and q (teacher) in double, a = p - mean, b = q - mean:
//
//     rho = sum a b / (|a| |b|),   d (1 - rho) / d a = rho a / |a|^2 - b / (|a| |b|)
//
// A first sweep makes the moments of each row and, block of rows by block, those of the columns. The second one makes the
// probabilities anew and writes d / d s = p (g - sum g p) / T.
namespace KDLAB_ISA {

// Calls body(offset, x, y) with the lanes of x and y in double.
template <class Body>
inline void in_double(F64 x, F64 y, Body body) { body(0, x, y); }
template <class Body>
inline void in_double(F32 x, F32 y, Body body) {
    constexpr int half = lanes<F64>;
    body(0, low_half(x), low_half(y));
    if (half < lanes<F32>) body(half, high_half(x), high_half(y));
}

template <class E>
class DistRows {
    typedef VecOf<E> V;
    typedef Real<V> R;
    const DistJob& job;
    const int64_t cols;
    const Temperature<V> temperature;
    R *ep, *eq;
    double* slope;

    const E* student(int64_t r) const { return static_cast<const E*>(job.student) + r * job.student_stride; }
    const E* teacher(int64_t r) const { return static_cast<const E*>(job.teacher) + r * job.teacher_stride; }

    // exp((x - max) / T) into e, whole vectors with zeros behind the end; one over their sum
    double exponentials(const E* x, R* e) const {
        const V low = all<V>(-INFINITY);
        V top = low;
        along_row<V>(cols, [&](int64_t i) { top = max(top, load(x + i)); },
                     [&](int64_t i, int n) { top = max(top, load_part(x + i, n, low)); }, [] {});
        const R most = max_of(top);
        RowSum<V> sum;
        auto one = [&](int64_t i, V v) {
            V y = softened_exp(v - most, temperature);
            store(e + i, y);
            sum.add(y);
        };
        along_row<V>(cols, [&](int64_t i) { one(i, load(x + i)); },
                     [&](int64_t i, int n) { one(i, load_part(x + i, n, low)); }, [&] { sum.carry(); });
        return 1 / sum.total();
    }

    // Calls body(i, p, q) for the row's probabilities in double.
    template <class Body>
    void probabilities(double over_p, double over_q, Body body) const {
        const F64 by_p = all<F64>(over_p), by_q = all<F64>(over_q);
        for (int64_t i = 0; i < cols; i += lanes<V>)
            in_double(load(ep + i), load(eq + i), [&](int at, F64 x, F64 y) { body(i + at, x * by_p, y * by_q); });
    }

public:
    DistRows(const DistJob& j, void* memory) : job(j), cols(j.cols), temperature(j.T) {
        ep = static_cast<R*>(memory);
        eq = ep + job.room();
        slope = reinterpret_cast<double*>(eq + job.room());
    }

    void moments(int64_t begin, int64_t end, double* column) const {
        const int64_t room = job.room();
        for (int64_t r = begin; r < end; ++r) {
            if (!job.counts(r)) continue;
            const double over_p = exponentials(student(r), ep), over_q = exponentials(teacher(r), eq);
            F64 sp = {}, sq = {}, pp = {}, qq = {}, pq = {};
            probabilities(over_p, over_q, [&](int64_t i, F64 p, F64 q) {
                const F64 terms[] = {p, q, p * p, q * q, p * q};
                sp = sp + p;
                sq = sq + q;
                pp = pp + terms[2];
                qq = qq + terms[3];
                pq = pq + terms[4];
                for (int k = 0; k < 5; ++k) store(column + k * room + i, load(column + k * room + i) + terms[k]);
            });
            job.row_parts[r] = Pearson(sum_of(sp), sum_of(sq), sum_of(pp), sum_of(qq), sum_of(pq), double(cols));
        }
    }

    void gradient(int64_t begin, int64_t end) const {
        for (int64_t r = begin; r < end; ++r) {
            E* grad = static_cast<E*>(job.grad) + r * cols;
            if (!job.counts(r)) {
                std::memset(grad, 0, cols * sizeof(E));
                continue;
            }
            const double over_p = exponentials(student(r), ep), over_q = exponentials(teacher(r), eq);
            const Pearson& x = job.row_parts[r];
            const F64 own = all<F64>(x.own * job.row_scale), other = all<F64>(x.other * job.row_scale);
            const F64 mean = all<F64>(1.0 / double(cols));
            F64 along = {};
            probabilities(over_p, over_q, [&](int64_t i, F64 p, F64 q) {
                const F64 a = p - load(job.mean_p + i), b = q - load(job.mean_q + i);
                const F64 g = own * (p - mean) + other * (q - mean) + load(job.own + i) * a + load(job.other + i) * b;
                along = along + g * p;
                store(slope + i, g);
            });
            const F64 shift = all<F64>(sum_of(along)), factor = all<F64>(over_p * job.scale / job.T);
            for (int64_t i = 0; i < cols; i += lanes<V>) {
                in_double(load(ep + i), load(ep + i), [&](int at, F64 e, F64) {
                    store(slope + i + at, (load(slope + i + at) - shift) * e * factor);
                });
                write(grad + i, slope + i, static_cast<int>(std::min<int64_t>(lanes<V>, cols - i)));
            }
        }
    }

    static void write(double* out, const double* x, int n) { std::memcpy(out, x, n * sizeof(double)); }
    template <class Out>
    static void write(Out* out, const double* x, int n) {
        float y[lanes<F32>] = {};
        for (int k = 0; k < n; ++k) y[k] = static_cast<float>(x[k]);
        if (n == lanes<F32>) store(out, load(y));
        else store_part(out, n, load(y));
    }
};

template <class E>
void dist_as(const DistJob& job, int64_t begin, int64_t end, double* column, void* scratch) {
    if (column) DistRows<E>(job, scratch).moments(begin, end, column);
    else DistRows<E>(job, scratch).gradient(begin, end);
}

// The moments of rows [begin, end), or their gradient where `column` is absent.
inline void dist(const DistJob& job, int64_t begin, int64_t end, double* column, void* scratch) {
    FlushDenormals flush;
    switch (job.dtype) {
        case KDLAB_F32: return dist_as<float>(job, begin, end, column, scratch);
        case KDLAB_F64: return dist_as<double>(job, begin, end, column, scratch);
        case KDLAB_BF16: return dist_as<bf16>(job, begin, end, column, scratch);
        case KDLAB_F16: return dist_as<f16>(job, begin, end, column, scratch);
    }
}

}  // namespace KDLAB_ISA
