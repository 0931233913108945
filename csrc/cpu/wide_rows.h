// Soft KL and cross-entropy of rows with many classes: lanes are classes. Included once per instruction set.
//
// One sweep over memory does three things at once: the maxima of the next row, the exponentials and sums of this row
// (kept in scratch), and the gradient of the row before, from scratch. Each input is read from memory once, and
// reading, arithmetic and writing overlap. Rows where the fast form is too coarse are then done again in close form.
namespace KDLAB_ISA {

template <class E>
struct Row {
    typedef Real<VecOf<E>> R;
    const E *s, *t;
    E* grad;
    R max_s, max_t;
    bool excludes;                          // the student has a class at -inf
};

template <class V>
struct Scratch { Real<V> *es, *et, *h; };

template <class V>
struct Extremes { V max_s, max_t, min_s; };

template <class V>
inline Extremes<V> nothing_seen() { return {all<V>(-INFINITY), all<V>(-INFINITY), all<V>(INFINITY)}; }

// A sum over a row: a few vectors are added in their own precision, then the lanes go on in double.
template <class V> class RowSum;
template <>
class RowSum<F32> {
    F32 part = {};
    F64 low = {}, high = {};
public:
    void add(F32 x) { part = part + x; }
    void carry() {
        low = low + low_half(part);
        high = high + high_half(part);
        part = F32{};
    }
    double total() const { return sum_of(low + high); }
};
template <>
class RowSum<F64> {
    F64 all = {};
public:
    void add(F64 x) { all = all + x; }
    void carry() {}
    double total() const { return sum_of(all); }
};
constexpr int64_t carry_every = 8;

template <class V>
struct Sums {
    RowSum<V> zs, zt, m, zh;
    template <bool kKL, bool kCE>
    void carry() {
        if (kKL) { zs.carry(); zt.carry(); m.carry(); }
        if (kCE) zh.carry();
    }
};

// A whole vector of a row, or with kTail its last n elements.
template <bool kTail, class E, class V>
inline V take(const E* p, int n, V fill) { return kTail ? load_part(p, n, fill) : load(p); }

template <bool kTail, class E, class V>
inline void give(E* p, int n, V v, bool past_cache) {
    if (kTail) store_part(p, n, v);
    else if (past_cache) stream(p, v);
    else store(p, v);
}

// Calls body(i) for whole vectors, tail(i, n) for the last n elements, and after every few vectors carry().
template <class V, class Body, class Tail, class Carry>
inline void along_row(int64_t cols, Body body, Tail tail, Carry carry) {
    constexpr int64_t step = carry_every * lanes<V>;
    const int64_t end = cols - cols % lanes<V>;
    int64_t i = 0;
    while (i < end) {
        for (int64_t stop = i + step < end ? i + step : end; i < stop; i += lanes<V>) body(i);
        carry();
    }
    if (i < cols) {
        tail(i, static_cast<int>(cols - i));
        carry();
    }
}

template <bool kKL, bool kCE, class E>
class WideRows {
    typedef VecOf<E> V;
    typedef Real<V> R;

    const Job& job;
    const int64_t cols, end;
    const Temperature<V> temperature, one{1.0};
    Scratch<V> x;
    const V low = all<V>(-INFINITY);

    Row<E> row_at(int64_t r) const {
        Row<E> row = {};
        row.s = static_cast<const E*>(job.student) + r * job.student_stride;
        row.t = kKL ? static_cast<const E*>(job.teacher) + r * job.teacher_stride : row.s;
        row.grad = job.grad ? static_cast<E*>(job.grad) + r * cols : nullptr;
        return row;
    }

    // The next row that counts; those before it are written as zeros.
    int64_t next_row(int64_t r) const {
        for (; r < end && !job.counts(r); ++r) {
            job.write_empty_row(r);
            if (job.grad) std::memset(static_cast<E*>(job.grad) + r * cols, 0, cols * sizeof(E));
        }
        return r;
    }

    template <bool kTail>
    void look(const Row<E>& row, int64_t i, int n, Extremes<V>& e) const {
        e.max_s = max(e.max_s, take<kTail>(row.s + i, n, low));
        if (!kKL) return;
        e.max_t = max(e.max_t, take<kTail>(row.t + i, n, low));
        e.min_s = min(e.min_s, take<kTail>(row.s + i, n, -low));
    }

    void set_extremes(Row<E>& row, const Extremes<V>& e) const {
        row.max_s = max_of(e.max_s);
        if (!kKL) return;
        row.max_t = max_of(e.max_t);
        row.excludes = max_of(-e.min_s) == INFINITY;
    }

    template <bool kTail>
    void exponentials(const Row<E>& row, int64_t i, int n, Sums<V>& z) const {
        V a = take<kTail>(row.s + i, n, low) - row.max_s;
        if (kKL) {
            V b = take<kTail>(row.t + i, n, low) - row.max_t;
            V es = softened_exp(a, temperature), et = softened_exp(b, temperature);
            store(x.es + i, es);
            store(x.et + i, et);
            z.zs.add(es);
            z.zt.add(et);
            z.m.add(weighted_difference(et, b, a, temperature));
        }
        if (kCE) {
            V h = softened_exp(a, one);
            store(x.h + i, h);
            z.zh.add(h);
        }
    }

    template <bool kTail>
    void gradient(E* grad, int64_t i, int n, const Factors<V>& f) const {
        V g = fast_gradient<kKL, kCE>(load(x.es + i), load(x.et + i), load(x.h + i), f);
        give<kTail>(grad + i, n, g, job.stream);
    }

    // Exponentials and sums of `row`; gradient of the row before, if kGrad; extremes of the next row.
    template <bool kGrad>
    void sweep(const Row<E>& row, E* grad, const Factors<V>& f, const Row<E>& next, Sums<V>& z, Extremes<V>& e) const {
        along_row<V>(cols,
            [&](int64_t i) {
                if (kGrad) gradient<false>(grad, i, 0, f);
                exponentials<false>(row, i, 0, z);
                prefetch(next.s + i);
                if (kKL) prefetch(next.t + i);
                look<false>(next, i, 0, e);
            },
            [&](int64_t i, int n) {
                if (kGrad) gradient<true>(grad, i, n, f);
                exponentials<true>(row, i, n, z);
                look<true>(next, i, n, e);
            },
            [&] { z.template carry<kKL, kCE>(); });
    }

    // Is the fast form too coarse here? Its error is about 1e-7 of what is subtracted: of the largest probability in
    // the gradient; in KL less, the more classes share the mass.
    static bool is_close(double kl, double zs, double zt) {
        if (sizeof(R) == 8) return kl < 1e-3;
        double top_s = 1 / zs, top_t = 1 / zt, top = top_s > top_t ? top_s : top_t;
        return kl < 0.03 + 0.16 * std::sqrt(top) || (top > 0.1 && std::fabs(top_s - top_t) < 0.15 * top);
    }

    // KL of the row and its whole gradient in close form.
    double close_row(const Row<E>& row, double zs, double zt, double kl_grad, V factor_h) const {
        const double c = double(row.max_s) - double(row.max_t);
        Close<V> k;
        k.c = all<V>(R(c));
        k.c_error = all<V>(R(c - double(R(c))));
        k.inverse_T = all<V>(R(1 / job.T));
        k.pt = all<V>(R(1 / zt));
        k.ps = all<V>(R(1 / zs));
        RowSum<V> mass, value;
        along_row<V>(cols,
            [&](int64_t i) {
                mass.add(close_mass(load(row.s + i), load(row.t + i), load(x.es + i), load(x.et + i), k));
            },
            [&](int64_t i, int n) {
                mass.add(close_mass(load_part(row.s + i, n, low), load_part(row.t + i, n, low), load(x.es + i),
                                    load(x.et + i), k));
            },
            [&] { mass.carry(); });
        double m = mass.total();
        k.lambda = all<V>(R(std::fabs(m) < 0.5 ? std::log1p(m) : std::log(zs / zt)));
        const V scale = all<V>(R(kl_grad));
        auto finish = [&](const CloseTerms<V>& terms, int64_t i) {
            value.add(terms.value);
            V g = terms.gradient * scale;
            return kCE ? fma(load(x.h + i), factor_h, g) : g;
        };
        along_row<V>(cols,
            [&](int64_t i) {
                V g = finish(close_terms(load(row.s + i), load(row.t + i), load(x.es + i), load(x.et + i), k), i);
                if (row.grad) give<false>(row.grad + i, 0, g, job.stream);
            },
            [&](int64_t i, int n) {
                V g = finish(close_terms(load_part(row.s + i, n, low), load_part(row.t + i, n, low), load(x.es + i),
                                         load(x.et + i), k), i);
                if (row.grad) store_part(row.grad + i, n, g);
            },
            [&] { value.carry(); });
        return value.total();
    }

    // Does the student exclude a class (-inf) that the teacher does not? Then KL is +inf.
    bool excludes_more(const Row<E>& row) const {
        for (int64_t i = 0; i < cols; ++i)
            if (to_real(row.s[i]) == -INFINITY && to_real(row.t[i]) > -INFINITY) return true;
        return false;
    }

    // CE with label y. Leaves h_y - Z_h in the place of h_y, so that the gradient is h / Z_h everywhere; from the other
    // classes where the label has most of the mass, because the difference would cancel.
    double hard_label(const Row<E>& row, int64_t y, double zh) const {
        double hy = x.h[y], others = zh - hy;
        bool confident = hy > 0.5 * zh;
        if (confident) {
            x.h[y] = 0;
            RowSum<V> sum;
            along_row<V>(cols, [&](int64_t i) { sum.add(load(x.h + i)); },
                         [&](int64_t i, int) { sum.add(load(x.h + i)); }, [&] { sum.carry(); });
            others = sum.total();
        }
        x.h[y] = R(-others);
        return confident ? std::log1p(others / hy) : std::log(zh) - (double(to_real(row.s[y])) - double(row.max_s));
    }

public:
    WideRows(const Job& j, int64_t stop, void* memory) : job(j), cols(j.cols), end(stop), temperature(j.T) {
        const int64_t padded = (cols + 15) / 16 * 16;
        R* m = static_cast<R*>(memory);
        x = {m, kKL ? m + padded : m, kCE && kKL ? m + 2 * padded : m};
    }

    void run(int64_t begin) const {
        int64_t r = next_row(begin);
        if (r >= end) return;
        Row<E> row = row_at(r);
        Extremes<V> e = nothing_seen<V>();
        along_row<V>(cols, [&](int64_t i) { look<false>(row, i, 0, e); },
                     [&](int64_t i, int n) { look<true>(row, i, n, e); }, [] {});
        set_extremes(row, e);
        E* pending = nullptr;                               // where the gradient of the row before goes
        Factors<V> f = {};
        while (r < end) {
            const int64_t n = next_row(r + 1);
            Row<E> next = n < end ? row_at(n) : row;
            Sums<V> z;
            e = nothing_seen<V>();
            if (pending) sweep<true>(row, pending, f, next, z, e);
            else sweep<false>(row, pending, f, next, z, e);
            pending = row.grad;
            const double g = job.grad_scale(r);
            double kl = 0, ce = 0;
            if (kCE) {
                double zh = z.zh.total();
                ce = hard_label(row, job.target[r], zh);
                f.h = all<V>(R(g * job.ce_weight / zh));
            }
            if (kKL) {
                double zs = z.zs.total(), zt = z.zt.total(), g_kl = g * job.kl_weight * job.kl_factor / job.T;
                f.s = all<V>(R(g_kl / zs));
                f.t = all<V>(R(g_kl / zt));
                kl = z.m.total() / zt / job.T + std::log(zs / zt);
                if (row.excludes && kl == kl && excludes_more(row)) kl = INFINITY;
                else if (is_close(kl, zs, zt)) {
                    kl = close_row(row, zs, zt, g_kl, f.h);
                    pending = nullptr;
                }
            }
            job.write_row(r, kl, ce);
            set_extremes(next, e);
            row = next;
            r = n;
        }
        if (pending)
            along_row<V>(cols, [&](int64_t i) { gradient<false>(pending, i, 0, f); },
                         [&](int64_t i, int n) { gradient<true>(pending, i, n, f); }, [] {});
        stream_end();
    }
};

}  // namespace KDLAB_ISA
