// KL between a teacher of which k classes a row are known and the student. Included once per instruction set.
//
// The teacher keeps the classes S with probabilities p_j of mass P; its rest r belongs to the n others. For the student,
// e = exp((s - max s) / T), Z = sum e, q = e / Z, and outside of S: Z_o = sum e, w = Z_o / Z. With KL the sum over S of
// p_j log(p_j / q_j), and g the gradient for s / T:
//
//                    value                                     g_j in S        g_i outside
//     drop           KL                                        P q_j - p_j     P q_i
//     renormalise    KL with p / P for p                       q_j - p_j       q_i
//     bucket         KL + r log(r / w)                         q_j - p_j       q_i (1 - r / w)
//     uniform        KL + sum over i of (r/n) log((r/n) / q_i) q_j - p_j       q_i - r / n
//     bucket, reverse  D = sum q_j l_j + w l, where
//                      l_j = log(q_j / p_j), l = log(w / r)    q_j (l_j - D)   q_i (l - D)
//
// So outside of S the gradient is f e_i - c. The sweep over memory is that of wide_rows.h; what belongs to S is done in
// double, one class after the other, and lies in the scratch row as the e for which f e - c is its gradient. Z_o is summed
// without S, or the student's sharp rows would lose its digits.
namespace KDLAB_ISA {

template <class E>
class SparseRows {
    typedef VecOf<E> V;
    typedef Real<V> R;

    struct Student { const E* s; E* grad; R max; };
    struct Teacher { int64_t kept; double mass, rest; bool spoilt, bad; };
    struct Outside { double total, z, unit, log_w, sum; };      // Z, Z_o, q_i / e_i, log w, sum of s - max s for uniform
    struct Result { double value, f, c, largest; };             // the largest |g| in S and at the student's maximum

    static constexpr double rounding = 1e-6, most_mass = 1.05;
    static constexpr double nothing = sizeof(R) == 8 ? 1e-250 : 1e-25;  // of Z: below, e loses digits
    static constexpr double lowest = -1e30;                     // in sums, where -inf would leave no way back

    const SparseJob& job;
    const int64_t cols, end;
    const bool has_bucket, is_uniform;
    const Temperature<V> temperature;
    const Temperature<F64> fine, one{1.0};
    const V low = all<V>(-INFINITY);
    double *lp, *p, *z, *ez, *g;                                // [kept]: log p, p, s - max s, exp(z / T), gradient
    int64_t* id;                                                // [kept]: class
    R* e;                                                       // [cols]

    Student student_at(int64_t r) const {
        return {static_cast<const E*>(job.student) + r * job.student_stride,
                job.grad ? static_cast<E*>(job.grad) + r * cols : nullptr, R(0)};
    }

    // The next row that counts; those before it are written as zeros.
    int64_t next_row(int64_t r) const {
        for (; r < end && !job.counts(r); ++r) {
            job.values[r] = 0;
            if (job.grad) std::memset(static_cast<E*>(job.grad) + r * cols, 0, cols * sizeof(E));
        }
        return r;
    }

    static void exponentials(const double* x, double* y, int64_t n, const Temperature<F64>& T) {
        for (int64_t i = 0; i < n; i += lanes<F64>) store(y + i, softened_exp(load(x + i), T));
    }

    // The kept classes of row r, and what becomes of the rest.
    Teacher teacher_at(int64_t r) const {
        Teacher t = {};
        for (int64_t j = r * job.k; j < (r + 1) * job.k; ++j) {
            const double x = job.log_probs[j];
            if (x == -INFINITY) continue;
            t.spoilt |= !(x < INFINITY);
            t.bad |= job.ids[j] < 0 || job.ids[j] >= cols;
            id[t.kept] = job.ids[j];
            lp[t.kept] = x;
            z[t.kept++] = x < 700 ? x : 700;
        }
        exponentials(z, p, t.kept, one);
        for (int64_t j = 0; j < t.kept; ++j) t.mass += p[j];
        t.bad |= !t.spoilt && t.mass > most_mass;
        if (job.tail == KDLAB_DROP) return t;
        if (job.tail == KDLAB_RENORMALISE || 1 - t.mass < rounding || t.kept >= cols) {
            if (t.mass > 0) {
                const double shift = std::log(t.mass);
                for (int64_t j = 0; j < t.kept; ++j) {
                    lp[j] -= shift;
                    p[j] /= t.mass;
                }
                t.mass = 1;
            }
        } else {
            t.rest = 1 - t.mass;
        }
        return t;
    }

    // Takes S out of the scratch row, which is left with 0 there; its share of Z. A class that comes twice is bad.
    double take_kept(const Student& x, Teacher& t) const {
        for (int64_t j = 0; j < t.kept; ++j) {
            z[j] = double(to_real(x.s[id[j]])) - double(x.max);
            t.bad |= e[id[j]] == R(-1);
            e[id[j]] = R(-1);
        }
        put_kept(t, R(0));
        exponentials(z, ez, t.kept, fine);
        double sum = 0;
        for (int64_t j = 0; j < t.kept; ++j) sum += ez[j];
        return sum;
    }

    void put_kept(const Teacher& t, R value) const {
        for (int64_t j = 0; j < t.kept; ++j) e[id[j]] = value;
    }

    static Outside shares(double kept, double z, double sum) {
        const double total = kept + z;
        return {total, z, 1 / total, std::log(z / total), sum};
    }

    // `sum` is that of s - max s over the whole row.
    Outside outside(const Student& x, const Teacher& t, double kept, double sum) const {
        RowSum<V> z_o;
        along_row<V>(cols, [&](int64_t i) { z_o.add(load(e + i)); }, [&](int64_t i, int) { z_o.add(load(e + i)); },
                     [&] { z_o.carry(); });
        Outside o = shares(kept, z_o.total(), sum);
        if (is_uniform && sum > lowest / 2) {
            for (int64_t j = 0; j < t.kept; ++j) o.sum -= z[j];
        } else if (is_uniform) {                                // some class is at -inf: in S or not?
            o.sum = 0;
            each_outside(x, t, [&](int64_t, double a) { o.sum += a; });
        }
        if (has_bucket && t.rest > 0 && o.z <= nothing * o.total) far_away(x, t, o);
        return o;
    }

    // Calls body(i, s_i - max s) outside of S, one by one; the scratch row is 0 in S afterwards.
    template <class Body>
    void each_outside(const Student& x, const Teacher& t, Body body) const {
        put_kept(t, R(-1));
        for (int64_t i = 0; i < cols; ++i)
            if (e[i] != R(-1)) body(i, double(to_real(x.s[i])) - double(x.max));
        put_kept(t, R(0));
    }

    // So little is left outside of S that e has no digits for it: it is measured from its own maximum.
    void far_away(const Student& x, const Teacher& t, Outside& o) const {
        double top = -INFINITY;
        each_outside(x, t, [&](int64_t, double a) { top = a > top ? a : top; });
        o = {o.total, 0, 0, -INFINITY, o.sum};
        if (top == -INFINITY) return;
        each_outside(x, t, [&](int64_t i, double a) {
            const double y = std::exp((a - top) / job.T);
            e[i] = R(y);
            o.z += y;
        });
        o.log_w = std::log(o.z) + top / job.T - std::log(o.total);
        o.unit = std::exp(o.log_w) / o.z;
    }

    // The same in double, for rows whose differences are smaller than the rounding of float.
    Outside closely(const Student& x, const Teacher& t, double kept) const {
        F64 z_all = {}, sum = {};
        const F64 most = all<F64>(x.max);
        auto add = [&](int, F64 s, F64) {
            const F64 a = s - most;
            sum = sum + a;
            z_all = z_all + softened_exp(a, fine);
        };
        const int64_t whole = cols - cols % lanes<V>;
        for (int64_t i = 0; i < whole; i += lanes<V>) in_double(load(x.s + i), load(x.s + i), add);
        double z_o = sum_of(z_all) - kept, sum_o = sum_of(sum);
        for (int64_t i = whole; i < cols; ++i) {
            const double a = double(to_real(x.s[i])) - double(x.max);
            z_o += std::exp(a / job.T);
            sum_o += a;
        }
        for (int64_t j = 0; j < t.kept; ++j) sum_o -= z[j];
        return shares(kept, z_o, sum_o);
    }

    Result forward(const Teacher& t, const Outside& o) const {
        const double all_mass = t.mass + t.rest, log_z = std::log(o.total), over_T = 1 / job.T;
        Result y = {0 * o.total, all_mass * o.unit, 0, 0};
        bool excludes = false;                                  // the student, a class that the teacher has not
        for (int64_t j = 0; j < t.kept; ++j) {
            const double q = ez[j] / o.total;
            if (z[j] == -INFINITY) excludes = true;
            else y.value += p[j] * (lp[j] - (z[j] * over_T - log_z));
            g[j] = all_mass * q - p[j];
            y.largest = std::max(y.largest, std::fabs(g[j]));
        }
        if (t.rest > 0 && job.tail == KDLAB_BUCKET) {
            y.value += t.rest * (std::log(t.rest) - o.log_w);
            y.f = o.z > 0 ? (o.z * o.unit - t.rest) / o.z : 0 * (o.z + o.total);
        }
        if (t.rest > 0 && is_uniform) {
            const double n = double(cols - t.kept), share = t.rest / n;
            y.value += t.rest * std::log(share) - share * (o.sum * over_T - n * log_z);
            y.c = share;
        }
        if (excludes && y.value == y.value) y.value = INFINITY;
        return y;
    }

    Result reverse(const Teacher& t, const Outside& o) const {
        const double log_z = std::log(o.total), w = o.z * o.unit, l = o.log_w - std::log(t.rest);
        Result y = {w > 0 ? w * l : 0 * o.total, 0, 0, 0};
        for (int64_t j = 0; j < t.kept; ++j) {
            g[j] = z[j] / job.T - log_z - lp[j];
            if (!(ez[j] == 0)) y.value += ez[j] / o.total * g[j];
        }
        for (int64_t j = 0; j < t.kept; ++j) {
            g[j] = ez[j] == 0 ? 0 : ez[j] / o.total * (g[j] - y.value);
            y.largest = std::max(y.largest, std::fabs(g[j]));
        }
        y.f = w == 0 ? 0 : (l - y.value) * o.unit;
        return y;
    }

    Result compare(const Teacher& t, const Outside& o) const {
        Result y = job.reverse ? reverse(t, o) : forward(t, o);
        bool keeps_top = false;
        for (int64_t j = 0; j < t.kept; ++j) keeps_top |= z[j] == 0;
        if (!keeps_top) y.largest = std::max(y.largest, std::fabs(y.f - y.c));      // e = 1 there
        return y;
    }

    // The error of Z_o, 1e-7 of it, against the differences that the value and the gradient in S are made of.
    bool is_close(const Teacher& t, const Outside& o, const Result& y) const {
        if (sizeof(R) == 8 || t.kept == cols || !std::isfinite(y.value)) return false;
        const double w = o.z * o.unit;
        if (y.largest < 0.15 * w / o.total) return true;
        if (has_bucket) return y.value < 0.2 * std::fabs(w - t.rest);
        double kept = 0;                                        // what the sum over the row loses to rounding because of S
        for (int64_t j = 0; is_uniform && j < t.kept; ++j) kept += std::fabs(z[j]);
        if (y.c * kept > 5 * job.T * std::fabs(y.value)) return true;
        return std::fabs(y.value) < 0.1 * (is_uniform ? t.rest : t.mass * w);
    }

    // uniform: is the student nearly flat where the teacher is? Then q_i - r / n is smaller than the rounding of q_i.
    bool is_flat(const Outside& o, const Result& y) const {
        if (sizeof(R) == 8 || y.c == 0) return false;
        V top = all<V>(0);
        along_row<V>(cols, [&](int64_t i) { top = max(top, load(e + i)); },
                     [&](int64_t i, int) { top = max(top, load(e + i)); }, [] {});
        const double most = max_of(top) * o.unit, apart = std::fabs(most - y.c);
        return std::max(apart, y.largest) < 0.15 * most;
    }

    static void write(double* out, const double* x, int n) { std::memcpy(out, x, n * sizeof(double)); }
    template <class Out>
    static void write(Out* out, const double* x, int n) {
        float y[lanes<F32>] = {};
        for (int k = 0; k < n; ++k) y[k] = static_cast<float>(x[k]);
        if (n == lanes<F32>) store(out, load(y));
        else store_part(out, n, load(y));
    }

    void write_flat(const Student& x, const Teacher& t, const Result& y, double scale) const {
        const F64 most = all<F64>(x.max), f = all<F64>(y.f * scale), c = all<F64>(y.c * scale);
        for (int64_t i = 0; i < cols; i += lanes<V>) {
            const int n = cols - i < lanes<V> ? static_cast<int>(cols - i) : lanes<V>;
            const V s = n == lanes<V> ? load(x.s + i) : load_part(x.s + i, n, low);
            double out[lanes<V>];
            in_double(s, s, [&](int at, F64 a, F64) { store(out + at, softened_exp(a - most, fine) * f - c); });
            write(x.grad + i, out, n);
        }
        for (int64_t j = 0; j < t.kept; ++j) from_real(R(g[j] * scale), x.grad + id[j]);
    }

    // Leaves in S what makes f e - c its gradient.
    void place_kept(const Teacher& t, const Outside& o, Result& y) const {
        if (std::fabs(y.f) <= 1e-3 * o.unit) {                  // too small to divide by
            const V f = all<V>(R(y.f));
            for (int64_t i = 0; i < cols; i += lanes<V>) store(e + i, load(e + i) * f);
            y.f = 1;
        }
        for (int64_t j = 0; j < t.kept; ++j) e[id[j]] = R((g[j] + y.c) / y.f);
    }

    template <bool kTail>
    void gradient(E* grad, int64_t i, int n, V f, V c) const {
        give<kTail>(grad + i, n, fma(load(e + i), f, -c), job.stream);
    }

    // Exponentials of `x`; gradient of the row before, if kGrad; maximum of the next row.
    template <bool kGrad, bool kSum>
    void sweep(const Student& x, E* grad, V f, V c, const Student& next, RowSum<V>& sum, V& top) const {
        auto exponential = [&](int64_t i, V s) { store(e + i, softened_exp(s - x.max, temperature)); };
        along_row<V>(cols,
            [&](int64_t i) {
                if (kGrad) gradient<false>(grad, i, 0, f, c);
                const V s = load(x.s + i);
                exponential(i, s);
                if (kSum) sum.add(max(all<V>(R(lowest)), s - x.max));
                prefetch(next.s + i);
                top = max(top, load(next.s + i));
            },
            [&](int64_t i, int n) {
                if (kGrad) gradient<true>(grad, i, n, f, c);
                exponential(i, load_part(x.s + i, n, low));
                if (kSum) sum.add(max(all<V>(R(lowest)), load_part(x.s + i, n, all<V>(x.max)) - x.max));
                top = max(top, load_part(next.s + i, n, low));
            },
            [&] { sum.carry(); });
    }

    void any_sweep(const Student& x, E* grad, V f, V c, const Student& next, RowSum<V>& sum, V& top) const {
        if (grad && is_uniform) sweep<true, true>(x, grad, f, c, next, sum, top);
        else if (grad) sweep<true, false>(x, grad, f, c, next, sum, top);
        else if (is_uniform) sweep<false, true>(x, grad, f, c, next, sum, top);
        else sweep<false, false>(x, grad, f, c, next, sum, top);
    }

    // After the sweep of row r. False if its gradient is written already.
    bool finish(int64_t r, const Student& x, double sum, double scale, Result& y) const {
        Teacher t = teacher_at(r);
        double kept = 0;
        if (!t.bad) kept = take_kept(x, t);
        job.bad[r] = t.bad;
        if (t.bad || t.spoilt) {
            y = {NAN, NAN, NAN, 0};
            return true;
        }
        Outside o = outside(x, t, kept, sum);
        y = compare(t, o);
        if (is_close(t, o, y)) y = compare(t, o = closely(x, t, kept));
        if (!x.grad) return true;
        if (is_flat(o, y)) {
            write_flat(x, t, y, scale);
            return false;
        }
        place_kept(t, o, y);
        return true;
    }

public:
    SparseRows(const SparseJob& j, int64_t stop, void* memory)
        : job(j), cols(j.cols), end(stop), has_bucket(j.tail == KDLAB_BUCKET), is_uniform(j.tail == KDLAB_UNIFORM),
          temperature(j.T), fine(j.T) {
        double* m = static_cast<double*>(memory);
        double** rooms[] = {&lp, &p, &z, &ez, &g};
        for (double** room : rooms) {
            *room = m;
            m += j.kept_room();
        }
        id = reinterpret_cast<int64_t*>(m);
        e = reinterpret_cast<R*>(m + j.kept_room());
    }

    void run(int64_t begin) const {
        int64_t r = next_row(begin);
        if (r >= end) return;
        Student x = student_at(r);
        V top = low;
        along_row<V>(cols, [&](int64_t i) { top = max(top, load(x.s + i)); },
                     [&](int64_t i, int n) { top = max(top, load_part(x.s + i, n, low)); }, [] {});
        x.max = max_of(top);
        E* pending = nullptr;                                   // where the gradient of the row before goes
        V f = {}, c = {};
        while (r < end) {
            const int64_t n = next_row(r + 1);
            Student next = n < end ? student_at(n) : x;
            RowSum<V> sum;
            top = low;
            any_sweep(x, pending, f, c, next, sum, top);
            const double scale = job.grad_scale(r) * job.factor / job.T;
            Result y;
            pending = finish(r, x, sum.total(), scale, y) ? x.grad : nullptr;
            f = all<V>(R(y.f * scale));
            c = all<V>(R(y.c * scale));
            job.write_row(r, y.value);
            next.max = max_of(top);
            x = next;
            r = n;
        }
        if (pending)
            along_row<V>(cols, [&](int64_t i) { gradient<false>(pending, i, 0, f, c); },
                         [&](int64_t i, int n) { gradient<true>(pending, i, n, f, c); }, [] {});
        stream_end();
    }
};

inline void sparse(const SparseJob& job, int64_t begin, int64_t end, void* scratch) {
    FlushDenormals flush;
    switch (job.dtype) {
        case KDLAB_F32: return SparseRows<float>(job, end, scratch).run(begin);
        case KDLAB_F64: return SparseRows<double>(job, end, scratch).run(begin);
        case KDLAB_BF16: return SparseRows<bf16>(job, end, scratch).run(begin);
        case KDLAB_F16: return SparseRows<f16>(job, end, scratch).run(begin);
    }
}

}  // namespace KDLAB_ISA
