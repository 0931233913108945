// DIST: 1 - Pearson correlation of probabilities, over rows and over columns. Included once per instruction set.
//
// Everything is made from the teacher's q and from d = p - q, which keeps its digits where student and teacher nearly
// agree: there d = q (e^v - 1) with v = log(p / q) from the logits themselves (see softened.h).
//
// A first sweep goes along a few rows, makes q and d and the moments of each row, and then goes down these rows for the
// moments of the columns. The second one makes q and d anew and writes d / d s = p (g - sum g p) / T.
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

// The first n lanes; zeros in the others
template <class V>
inline V first(V x, int n) {
    Real<V> lane[lanes<V>];
    store(lane, x);
    return load_part(lane, n, V{});
}

// Sums of one or of each lane's column
struct Moments {
    F64 q = {}, d = {}, qq = {}, qd = {}, dd = {}, pp = {};
    void add(F64 x, F64 y) {
        F64 z = x + y;
        pp = fma(z, z, pp);
        q = q + x;
        d = d + y;
        qq = fma(x, x, qq);
        qd = fma(x, y, qd);
        dd = fma(y, y, dd);
    }
    PairSums total() const { return {sum_of(q), sum_of(d), sum_of(qq), sum_of(qd), sum_of(dd), sum_of(pp)}; }
    void add_to(double* column, int64_t room) const {
        const F64 sums[] = {q, d, qq, qd, dd, pp};
        for (int k = 0; k < 6; ++k) store(column + k * room, load(column + k * room) + sums[k]);
    }
};

template <class E>
class DistRows {
    typedef VecOf<E> V;
    typedef Real<V> R;
    const DistJob& job;
    const int64_t cols, room;
    const Temperature<V> temperature;
    R* memory;
    const V zero = {}, low = all<V>(-INFINITY);

    const E* student(int64_t r) const { return static_cast<const E*>(job.student) + r * job.student_stride; }
    const E* teacher(int64_t r) const { return static_cast<const E*>(job.teacher) + r * job.teacher_stride; }

    const R* column(int k) const { return static_cast<const R*>(job.columns) + k * room; }

    double largest(const E* x, int64_t n) const {
        V top = low;
        along_row<V>(n, [&](int64_t i) { top = max(top, load(x + i)); },
                     [&](int64_t i, int k) { top = max(top, load_part(x + i, k, low)); }, [] {});
        return max_of(top);
    }

    // exp((x - top) / T) of both sides into es and et, whole vectors with zeros behind the end, and one over their sums. What
    // a top is does not matter, as long as nothing is much larger: mostly the largest of the first elements does for it.
    void exponentials(DistRow& row, const E* s, const E* t, R* es, R* et) const {
        const int64_t few = std::min<int64_t>(cols, 8 * lanes<V>);
        row.top_s = largest(s, few);
        row.top_t = largest(t, few);
        for (bool again = true; again;) {
            RowSum<V> zs, zt;
            V most_s = low, most_t = low;
            const V from_s = all<V>(R(row.top_s)), from_t = all<V>(R(row.top_t));
            auto one = [&](int64_t i, V a, V b) {
                V x = quick_exp(a - from_s, temperature), y = quick_exp(b - from_t, temperature);
                store(es + i, x);
                store(et + i, y);
                most_s = max(most_s, a);
                most_t = max(most_t, b);
                zs.add(x);
                zt.add(y);
            };
            along_row<V>(cols, [&](int64_t i) { one(i, load(s + i), load(t + i)); },
                         [&](int64_t i, int n) { one(i, load_part(s + i, n, low), load_part(t + i, n, low)); },
                         [&] { zs.carry(); zt.carry(); });
            row.over_s = 1 / zs.total();
            row.over_t = 1 / zt.total();
            again = false;
            auto raise = [&](double& top, double largest) {
                if (!(largest > top && !(largest <= top + 2.5 * job.T))) return;
                top = largest;
                again = true;
            };
            raise(row.top_s, max_of(most_s));
            raise(row.top_t, max_of(most_t));
        }
    }

    // p and q, where the row is not close. Their moments about 1 / cols, the mean of both, lose no digits as the sums of the
    // logits' precision that they are.
    PairSums plain_row(const DistRow& row, const E* next_s, const E* next_t, R* es, R* et) const {
        const V over_s = all<V>(R(row.over_s)), over_t = all<V>(R(row.over_t)), mean = all<V>(R(1 / double(cols)));
        RowSum<V> sq, sd, qq, qd, dd, pp;
        auto one = [&](int64_t i, V q, V p, V a, V b) {
            store(et + i, q);
            store(es + i, p);
            fetch(next_s + i);                              // spread over the work, or memory would make it wait
            fetch(next_t + i);
            const V d = p - q;
            sq.add(a);
            sd.add(d);
            qq.add(a * a);
            qd.add(a * d);
            dd.add(d * d);
            pp.add(b * b);
        };
        along_row<V>(cols, [&](int64_t i) {
            const V q = load(et + i) * over_t, p = load(es + i) * over_s;
            one(i, q, p, q - mean, p - mean);
        }, [&](int64_t i, int n) {
            const V q = load(et + i) * over_t, p = load(es + i) * over_s;
            one(i, q, p, first(q - mean, n), first(p - mean, n));
        }, [&] { sq.carry(); sd.carry(); qq.carry(); qd.carry(); dd.carry(); pp.carry(); });
        return {sq.total(), sd.total(), qq.total(), qd.total(), dd.total(), pp.total()};
    }

    // d = q (e^v - 1), v = log(p / q) but for the rounding of both sums. What that leaves of the sum of d is taken out.
    struct CloseRow {
        Close<V> k;
        V inverse, share;
        V d(V s, V t, V p, V q) const {
            V v = k.w(s, t);
            return abs(v) < series_range<V> ? q * (v + psi(v)) : p - q;
        }
        V exact(V d, V q) const { return fma(d, inverse, -(q * share)); }
    };

    CloseRow close_row(const DistRow& row) const {
        CloseRow x = {};
        x.k.c = all<V>(R(row.c));
        x.k.c_error = all<V>(R(row.c - double(R(row.c))));
        x.k.inverse_T = all<V>(R(1 / job.T));
        x.inverse = all<V>(R(1 / (1 + row.mass)));
        x.share = all<V>(R(row.mass / (1 + row.mass)));
        return x;
    }

    // Replaces p by d.
    PairSums moments_of_close(DistRow& row, const E* s, const E* t, R* d, R* q) const {
        row.c = row.top_s - row.top_t + job.T * std::log(row.over_t / row.over_s);
        CloseRow x = close_row(row);
        RowSum<V> mass;
        auto one = [&](int64_t i, V s, V t) {
            V y = x.d(s, t, load(d + i), load(q + i));
            store(d + i, y);
            mass.add(y);
        };
        along_row<V>(cols, [&](int64_t i) { one(i, load(s + i), load(t + i)); },
                     [&](int64_t i, int n) { one(i, load_part(s + i, n, low), load_part(t + i, n, low)); },
                     [&] { mass.carry(); });
        row.mass = mass.total();
        x = close_row(row);
        Moments m;
        for (int64_t i = 0; i < cols; i += lanes<V>) {
            V y = x.exact(load(d + i), load(q + i));
            store(d + i, y);
            in_double(load(q + i), y, [&](int, F64 a, F64 b) { m.add(a, b); });
        }
        return m.total();
    }

    void row_moments(int64_t r, R* d, R* q) const {
        const double near = sizeof(R) == 4 ? 0.01 : 1e-6;       // below this, p - q has lost too many digits
        DistRow& row = job.row_parts[r];
        exponentials(row, student(r), teacher(r), d, q);
        PairSums x = plain_row(row, student(r + 1), teacher(r + 1), d, q);
        const double n = double(cols), mean = double(R(1 / n)), raw = x.qq + mean * (2 * x.q + n * mean);
        row.close = x.dd < near * raw;
        row.pearson = row.close ? Pearson(moments_of_close(row, student(r), teacher(r), d, q), n) : Pearson(x, n, mean);
    }

public:
    DistRows(const DistJob& j, void* m) : job(j), cols(j.cols), room(j.room()), temperature(j.T), memory(static_cast<R*>(m)) {}

    void moments(int64_t begin, int64_t end, double* column) const {
        const int64_t together = job.together();
        F64 of_q[8];                                        // what of q to take from what is there, for d
        for (int64_t r = begin; r < end;) {
            int64_t n = 0;
            for (; r < end && n < together; ++r) {
                if (!job.counts(r)) continue;
                row_moments(r, memory + 2 * n * room, memory + (2 * n + 1) * room);
                of_q[n++] = all<F64>(job.row_parts[r].close ? 0 : -1);
            }
            for (int64_t i = 0; i < cols; i += lanes<V>) {
                Moments m[2];
                for (int64_t k = 0; k < n; ++k)
                    in_double(load(memory + (2 * k + 1) * room + i), load(memory + 2 * k * room + i),
                              [&](int at, F64 q, F64 x) { m[at != 0].add(q, fma(of_q[k], q, x)); });
                m[0].add_to(column + i, room);
                if (lanes<F64> < lanes<V>) m[1].add_to(column + i + lanes<F64>, room);
            }
        }
    }

    // With h = g p for the slope g of the loss at p: d / d s = (h - p sum h) / T
    template <bool kClose>
    double slopes(const DistRow& row, const E* s, const E* t, const E* grad, R* h, R* p) const {
        const int form = kClose ? 3 : 6;
        const R *mean_q = column(0), *own = column(1), *over = column(2), *mean = column(form), *other = column(form + 1),
                *rest = column(form + 2);
        const double to_q = row.pearson.other - (kClose ? 0 : row.pearson.own);
        const V row_own = all<V>(R(row.pearson.own * job.row_scale)), row_other = all<V>(R(to_q * job.row_scale));
        const V top_s = all<V>(R(row.top_s)), top_t = all<V>(R(row.top_t));
        const V over_s = all<V>(R(row.over_s)), over_t = all<V>(R(row.over_t));
        const CloseRow close = close_row(row);
        RowSum<V> sum;
        auto one = [&](int64_t i, V s, V t) {
            V q = quick_exp(t - top_t, temperature) * over_t, ps = quick_exp(s - top_s, temperature) * over_s;
            V y = kClose ? close.exact(close.d(s, t, ps, q), q) : ps;
            V by_row = fma(y, row_own, q * row_other);
            V by_column = fma(y - load(mean + i), load(own + i), fma(q - load(mean_q + i), load(other + i), load(rest + i)));
            V x = ps * fma(by_column, load(over + i), by_row);
            store(p + i, ps);
            store(h + i, x);
            sum.add(x);
        };
        along_row<V>(cols, [&](int64_t i) {
            one(i, load(s + i), load(t + i));
            fetch(s + job.student_stride + i);
            fetch(t + job.teacher_stride + i);
        }, [&](int64_t i, int n) { one(i, load_part(s + i, n, low), load_part(t + i, n, low)); }, [&] { sum.carry(); });
        return sum.total();
    }

    void gradient(int64_t begin, int64_t end) const {
        R *h = memory, *p = memory + room;
        for (int64_t r = begin; r < end; ++r) {
            E* grad = static_cast<E*>(job.grad) + r * cols;
            if (!job.counts(r)) {
                std::memset(grad, 0, cols * sizeof(E));
                continue;
            }
            const DistRow& row = job.row_parts[r];
            const double along = row.close ? slopes<true>(row, student(r), teacher(r), grad, h, p)
                                           : slopes<false>(row, student(r), teacher(r), grad, h, p);
            const V shift = all<V>(R(-along)), factor = all<V>(R(job.scale / job.T));
            auto at = [&](int64_t i) { return fma(load(p + i), shift, load(h + i)) * factor; };
            int64_t i = 0;
            if (job.stream) {                               // past the cache, for which the address must be round
                const int64_t bytes = sizeof(E) * lanes<V>, head = (bytes - reinterpret_cast<uintptr_t>(grad) % bytes) % bytes / sizeof(E);
                i = std::min(head, cols);
                if (i) store_part(grad, static_cast<int>(i), at(0));
                for (; i + lanes<V> <= cols; i += lanes<V>) stream(grad + i, at(i));
            }
            for (; i + lanes<V> <= cols; i += lanes<V>) store(grad + i, at(i));
            if (i < cols) store_part(grad + i, static_cast<int>(cols - i), at(i));
        }
    }
};

template <class E>
void dist_as(const DistJob& job, int64_t begin, int64_t end, double* column, void* scratch) {
    if (column) DistRows<E>(job, scratch).moments(begin, end, column);
    else DistRows<E>(job, scratch).gradient(begin, end);
    stream_end();
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
