// Softened divergences and cross-entropy of rows with many classes: lanes are classes. Included once per instruction set.
//
// One sweep over memory does two things at once: the exponentials and sums of this row (kept in scratch), and the
// gradient of the row before, from scratch. Each input is read from memory once, and reading, arithmetic and writing
// overlap. Nothing is spent on finding the maxima first: exponentials are relative to a reference, the maximum of the
// row's first elements. Where the row exceeds it by much, its maximum so far becomes the new reference, and what was
// made with older ones is brought up to date at the end. Rows where the fast form is too coarse are then done again in
// close form, or careful form.
//
// The gradient is always a mixture of two scratch rows. For the forward KL they are the exponentials themselves; for the
// reverse KL the second is e_s (b - a). The other divergences need both sums Z before their slopes, and replace the
// second row in a pass of its own, while all of it is in the cache.
namespace KDLAB_ISA {

template <class E>
struct Row {
    typedef Real<VecOf<E>> R;
    const E *s, *t;
    E* grad;
    R from_s, from_t;                       // the references
};

// What a part of a row adds up to; `entropy` is the sum of e_t b
template <class V>
struct Part { V zs, zt, m, zh, entropy; };

template <class V>
inline Part<V> operator+(const Part<V>& x, const Part<V>& y) {
    return {x.zs + y.zs, x.zt + y.zt, x.m + y.m, x.zh + y.zh, x.entropy + y.entropy};
}

// A sum over a row, relative to a reference that may change on the way
template <class V>
class RelativeSum {
    RowSum<V> sum;
    double before = 0;                                      // what was summed up before the reference changed last
public:
    void carry(V part) { sum.carry(part); }
    double total() const { return before + sum.total(); }
    void replace(double x) {
        sum = RowSum<V>();
        before = x;
    }
};

template <class V>
struct Sums {
    RelativeSum<V> zs, zt, m, zh, entropy;
    V top_s = all<V>(-INFINITY), top_t = top_s;             // maxima of the row so far
    bool raised = false;                                    // was the reference changed?

    template <int kSweep, bool kCE>
    void carry(const Part<V>& p) {
        if (kSweep != only_cross_entropy) { zs.carry(p.zs); zt.carry(p.zt); m.carry(p.m); }
        if (kSweep == KDLAB_SOFT_CROSS_ENTROPY) entropy.carry(p.entropy);
        if (kCE) zh.carry(p.zh);
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

// Two whole vectors of a row. bfloat16 has its own where that is worth it.
template <class E, class V>
inline void load_pair(const E* p, V& x, V& y) {
    x = load(p);
    y = load(p + lanes<V>);
}

template <class E, class V>
inline void give_pair(E* p, V x, V y, bool past_cache) {
    give<false>(p, 0, x, past_cache);
    give<false>(p + lanes<V>, 0, y, past_cache);
}

// kSweep is the divergence, or another that needs the same sums: the forward KL for total variation, JSD for a mixture.
template <int kSweep, bool kCE, class E>
class WideRows {
    static constexpr bool kKL = kSweep != only_cross_entropy, kReverse = kSweep == KDLAB_REVERSE_KL;
    static constexpr bool kSoftCE = kSweep == KDLAB_SOFT_CROSS_ENTROPY;
    static constexpr bool kForward = kSweep == KDLAB_FORWARD_KL || kSoftCE;
    typedef VecOf<E> V;
    typedef Real<V> R;

    const Job& job;
    const int64_t cols, padded, end;
    const Temperature<V> temperature, one{1.0};
    Scratch<V> x;
    static constexpr int most_e = 4;                        // the largest exponential
    R margin;                                               // by how much a row may exceed its reference, so that it is
    struct Reference { R s, t; } *references;               // of each step along the row
    // Logits are prefetched into the first cache, or the second: faster by a tenth where that holds the scratch as well,
    // but not for short rows, nor for halves of a float.
    const bool second_cache;
    const V low = all<V>(-INFINITY);
    static constexpr int64_t step = (lanes<V> < 16 ? 8 : 16) * lanes<V>;     // the fewer lanes, the shorter their sums

    Row<E> row_at(int64_t r) const {
        Row<E> row = {};
        row.s = static_cast<const E*>(job.student) + r * job.student_stride;
        row.t = kKL ? static_cast<const E*>(job.teacher) + r * job.teacher_stride : row.s;
        row.grad = job.grad ? static_cast<E*>(job.grad) + r * cols : nullptr;
        first_references(row);
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

    void first_references(Row<E>& row) const {
        V s = low, t = low;
        along_row<V>(cols < step ? cols : step,
            [&](int64_t i) {
                s = max(load(row.s + i), s);
                if (kKL) t = max(load(row.t + i), t);
            },
            [&](int64_t i, int n) {
                s = max(load_part(row.s + i, n, low), s);
                if (kKL) t = max(load_part(row.t + i, n, low), t);
            }, [] {});
        row.from_s = std::fmax(max_of(s), Scalar<V>::least);                     // finite, so that -inf is far below
        row.from_t = std::fmax(max_of(t), Scalar<V>::least);
    }

    // From now on the maxima so far are the references.
    void raise_references(Row<E>& row, Sums<V>& z) const {
        const Row<E> old = row;
        row.from_s = std::fmax(row.from_s, max_of(z.top_s));
        double up_s = double(row.from_s) - double(old.from_s);
        if (kKL) {
            row.from_t = std::fmax(row.from_t, max_of(z.top_t));
            double up_t = double(row.from_t) - double(old.from_t), zs = z.zs.total(), zt = z.zt.total();
            double fall_s = std::exp(-up_s / job.T), fall_t = std::exp(-up_t / job.T);
            z.m.replace((z.m.total() + (up_s - up_t) * (kReverse ? zs : zt)) * (kReverse ? fall_s : fall_t));
            z.entropy.replace((z.entropy.total() - up_t * zt) * fall_t);
            z.zt.replace(zt * fall_t);
            z.zs.replace(zs * fall_s);
        }
        if (kCE) z.zh.replace(z.zh.total() * std::exp(-up_s));
    }

    static void lower(R* e, int64_t end, R up, const Temperature<V>& T) {
        if (up == 0) return;
        const V fall = softened_exp(all<V>(-up), T);
        for (int64_t i = 0; i < end; i += lanes<V>) store(e + i, load(e + i) * fall);
    }

    // The same for e_s (b - a), before e_s is lowered
    void lower_differences(int64_t begin, int64_t n, R up_s, R more) const {
        if (up_s == 0 && more == 0) return;
        const V fall = softened_exp(all<V>(-up_s), temperature), add = all<V>(more);
        for (int64_t i = begin; i < begin + n; i += lanes<V>)
            store(x.et + i, fma(load(x.es + i), add, load(x.et + i)) * fall);
    }

    // Makes all exponentials relative to the row's last references.
    void bring_up_to_date(const Row<E>& row) const {
        const Reference* from = references;
        for (int64_t i = 0; i < cols; i += step, ++from) {
            const int64_t n = cols - i < step ? cols - i : step;
            const R up_s = row.from_s - from->s, up_t = row.from_t - from->t;
            if (kReverse) lower_differences(i, n, up_s, up_s - up_t);
            if (kKL) lower(x.es + i, n, up_s, temperature);
            if (kKL && !kReverse) lower(x.et + i, n, up_t, temperature);
            if (kCE) lower(x.h + i, n, row.from_s - from->s, one);
        }
    }

    // Asks memory for two vectors ahead of p.
    static void ask_ahead(const E* p, bool second_cache) {
        if (second_cache) {
            const char* next = reinterpret_cast<const char*>(p) + 2560;
            fetch(next);
            fetch(next + sizeof(V));
        } else {
            prefetch(p);
            if (sizeof(E) > 2) prefetch(p + lanes<V>);
        }
    }

    // Elements from `begin` to `end`: exponentials and sums of `row`, and if kGrad the gradient of the row before. What
    // lies behind the row's end counts nothing.
    template <bool kGrad>
    Part<V> part(const Row<E>& row, E* grad, const Factors<V>& factors, int64_t begin, int64_t end, Sums<V>& z) const {
        const E *const row_s = row.s, *const row_t = row.t;                      // all of these in registers
        const V from_s = all<V>(row.from_s), from_t = all<V>(row.from_t);
        const Scratch<V> x = this->x;
        const Temperature<V> T = temperature;
        const Factors<V> f = factors;
        const bool past_cache = job.stream;
        const bool second_cache = this->second_cache;
        V top_s = z.top_s, top_t = z.top_t;
        auto exponentials = [&](int64_t i, V s, V t, Part<V>& p) {
            V a = s - from_s;
            top_s = max(s, top_s);
            if (kKL) {
                V b = t - from_t, es = quick_exp<is_mixture(kSweep)>(a, T), et = quick_exp<is_mixture(kSweep)>(b, T);
                top_t = max(t, top_t);
                p.zs = p.zs + es;
                p.zt = p.zt + et;
                if (kReverse) {
                    et = es * (b - a);
                    p.m = p.m + et;
                } else {
                    p.m = fma(et, b - a, p.m);
                }
                if (kSoftCE) p.entropy = fma(et, b, p.entropy);
                store(x.es + i, es);
                store(x.et + i, et);
            }
            if (kCE) {
                V h = quick_exp(a, one);
                store(x.h + i, h);
                p.zh = p.zh + h;
            }
        };
        constexpr int64_t L = lanes<V>;
        Part<V> even = {}, odd = {};                        // two sums of half as many terms round less than one
        int64_t i = begin;
        for (; i + 2 * L <= end; i += 2 * L) {
            if (kGrad) give_pair(grad + i, gradient_at(x, i, f), gradient_at(x, i + L, f), past_cache);
            V s[2], t[2] = {};
            load_pair(row_s + i, s[0], s[1]);
            ask_ahead(row_s + i, second_cache);
            if (kKL) {
                load_pair(row_t + i, t[0], t[1]);
                ask_ahead(row_t + i, second_cache);
            }
            exponentials(i, s[0], t[0], even);
            exponentials(i + L, s[1], t[1], odd);
        }
        if (i + L <= end) {
            if (kGrad) give<false>(grad + i, 0, gradient_at(x, i, f), past_cache);
            exponentials(i, load(row_s + i), load(row_t + i), even);
            i += L;
        }
        if (i < end) {
            const int n = static_cast<int>(end - i);
            if (kGrad) store_part(grad + i, n, gradient_at(x, i, f));
            exponentials(i, load_part(row_s + i, n, nothing_to(row.from_s)),
                         load_part(row_t + i, n, nothing_to(row.from_t)), odd);
        }
        z.top_s = top_s;
        z.top_t = top_t;
        return even + odd;
    }

    // What adds nothing to the sums: finite where it can be, because 0 * -inf would look like an excluded class.
    static V nothing_to(R from) { return all<V>(from > Scalar<V>::lowest / 2 ? Scalar<V>::lowest : R(-INFINITY)); }

    static V gradient_at(const Scratch<V>& x, int64_t i, const Factors<V>& f) {
        return fast_gradient<kKL, kCE>(load(x.es + i), load(x.et + i), load(x.h + i), f);
    }

    // Exponentials and sums of `row`, and if kGrad the gradient of the row before
    template <bool kGrad>
    Sums<V> sweep(Row<E>& row, E* grad, const Factors<V>& f) const {
        Sums<V> z;
        bool raised = false;
        Reference* from = references;
        for (int64_t begin = 0; begin < cols; begin += step) {
            const int64_t end = begin + step < cols ? begin + step : cols;
            Part<V> p = part<kGrad>(row, grad, f, begin, end, z);
            if (max_of(max(z.top_s - row.from_s, z.top_t - row.from_t)) > margin) {
                raised = true;
                raise_references(row, z);
                p = part<false>(row, grad, f, begin, end, z);
            }
            *from++ = {row.from_s, row.from_t};
            z.template carry<kSweep, kCE>(p);
        }
        if (raised) bring_up_to_date(row);
        z.raised = raised;
        return z;
    }

    // M where 0 * -inf = 0
    double sum_of_differences(const Row<E>& row) const {
        RowSum<V> m;
        auto add = [&](V s, V t, int64_t i) {
            m.add(weighted_difference(load(x.et + i), t - row.from_t, s - row.from_s, temperature));
        };
        along_row<V>(cols, [&](int64_t i) { add(load(row.s + i), load(row.t + i), i); },
                     [&](int64_t i, int n) { add(load_part(row.s + i, n, low), load_part(row.t + i, n, low), i); },
                     [&] { m.carry(); });
        return m.total();
    }

    // Is the fast form too coarse here? Its error is about 1e-7 of what is subtracted: of the largest probability in
    // the gradient; in KL less, the more classes share the mass.
    bool is_close(const Row<E>& row, double kl, double zs, double zt, const Sums<V>& z) const {
        if (sizeof(R) == 8) return kl < 1e-3;
        const double no_top_above = most_e / std::fmin(zs, zt);
        if (no_top_above < 0.1 && kl > 0.03 + 0.16 * std::sqrt(no_top_above)) return false;
        double top_s = max_of(softened_exp(z.top_s - row.from_s, temperature)) / zs;
        double top_t = max_of(softened_exp(z.top_t - row.from_t, temperature)) / zt;
        double top = std::fmax(top_s, top_t);
        return kl < 0.03 + 0.16 * std::sqrt(top) || (top > 0.1 && std::fabs(top_s - top_t) < 0.15 * top);
    }

    // KL of the row in close form, with lambda = 0: M = sum p_t (e^w - 1) is about 0 here. p_t (e^w - 1) takes the place
    // of e_s, so that the gradient is made as for every row, from p_s - p_t = (p_t (e^w - 1) - M p_t) / (1 + M).
    double close_row(const Row<E>& row, double zs, double zt, double kl_grad, Factors<V>& f) const {
        const double c = double(row.from_s) - double(row.from_t) + job.T * std::log(zs / zt);
        Close<V> k = {};
        k.c = all<V>(R(c));
        k.c_error = all<V>(R(c - double(R(c))));
        k.inverse_T = all<V>(R(1 / job.T));
        k.pt = all<V>(R(1 / zt));
        k.ps = all<V>(R(1 / zs));
        RowSum<V> mass, value;
        auto one = [&](V s, V t, int64_t i) {
            prefetch(row.s + job.student_stride + i);       // of the next row, while memory would be idle
            prefetch(row.t + job.teacher_stride + i);
            CloseTerms<V> terms = close_terms(s, t, load(x.es + i), load(x.et + i), k);
            store(x.es + i, terms.gradient);
            mass.add(terms.gradient);
            value.add(terms.value);
        };
        along_row<V>(cols, [&](int64_t i) { one(load(row.s + i), load(row.t + i), i); },
                     [&](int64_t i, int n) { one(load_part(row.s + i, n, low), load_part(row.t + i, n, low), i); },
                     [&] { mass.carry(); value.carry(); });
        const double M = mass.total();
        f.s = all<V>(R(kl_grad / (1 + M)));
        f.t = all<V>(R(kl_grad * M / (1 + M) / zt));
        return value.total() + (std::log1p(M) - M);
    }

    // Does the student exclude a class (-inf) that the teacher does not? Then KL is +inf. For the reverse KL: the teacher.
    bool excludes_more(const Row<E>& row) const {
        const E *out = kReverse ? row.t : row.s, *in = kReverse ? row.s : row.t;
        for (int64_t i = 0; i < cols; ++i)
            if (to_real(out[i]) == -INFINITY && to_real(in[i]) > -INFINITY) return true;
        return false;
    }

    // The row's logits in the precision of the arithmetic, copied if they are not
    RealRow<V> real(const Row<E>& row) const {
        if constexpr (sizeof(E) == sizeof(R)) {
            return {row.s, row.t, row.from_s, row.from_t};
        } else {
            R *s = reinterpret_cast<R*>(references) - 2 * padded, *t = s + padded;
            along_row<V>(cols, [&](int64_t i) { store(s + i, load(row.s + i)); store(t + i, load(row.t + i)); },
                [&](int64_t i, int n) {
                    store(s + i, load_part(row.s + i, n, low));
                    store(t + i, load_part(row.t + i, n, low));
                }, [] {});
            return {s, t, row.from_s, row.from_t};
        }
    }

    double family(const RealRow<V>& row, const RowSums<V>& z, double g, Factors<V>& f) const {
        if constexpr (kReverse) return FamilyRows<KDLAB_REVERSE_KL, V>(job, temperature, x).value(row, z, g, f);
        switch (job.kind) {
            case KDLAB_JSD: return FamilyRows<KDLAB_JSD, V>(job, temperature, x).value(row, z, g, f);
            case KDLAB_SKEW_KL: return FamilyRows<KDLAB_SKEW_KL, V>(job, temperature, x).value(row, z, g, f);
            case KDLAB_SKEW_REVERSE_KL: return FamilyRows<KDLAB_SKEW_REVERSE_KL, V>(job, temperature, x).value(row, z, g, f);
            default: return FamilyRows<KDLAB_TOTAL_VARIATION, V>(job, temperature, x).value(row, z, g, f);
        }
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
        return confident ? std::log1p(others / hy) : std::log(zh) - (double(to_real(row.s[y])) - double(row.from_s));
    }

public:
    WideRows(const Job& j, int64_t stop, void* memory)
        : job(j), cols(j.cols), padded((cols + 15) / 16 * 16), end(stop), temperature(j.T),
          second_cache(sizeof(E) > 2 && cols >= 4096 && cols * sizeof(E) <= 256 << 10) {
        R* m = static_cast<R*>(memory);
        x = {m, kKL ? m + padded : m, kCE && kKL ? m + 2 * padded : m};
        references = reinterpret_cast<Reference*>(m + (sizeof(E) < sizeof(R) ? 5 : 3) * padded);
        margin = R(std::log(most_e) * (kCE && job.T > 1 ? 1 : job.T));
    }

    void run(int64_t begin) const {
        E* pending = nullptr;                               // where the gradient of the row before goes
        Factors<V> f = {};
        for (int64_t r = next_row(begin); r < end; r = next_row(r + 1)) {
            Row<E> row = row_at(r);
            Sums<V> z = pending ? sweep<true>(row, pending, f) : sweep<false>(row, nullptr, f);
            pending = row.grad;
            const double g = job.grad_scale(r);
            double kl = 0, ce = 0;
            if (kCE) {
                double zh = z.zh.total();
                ce = hard_label(row, job.target[r], zh);
                f.h = all<V>(R(g * job.ce_weight / zh));
            }
            if constexpr (kKL) {
                double zs = z.zs.total(), zt = z.zt.total(), m = z.m.total();
                double g_kl = g * job.kl_weight * job.kl_factor / job.T;
                bool excludes = !std::isfinite(m);          // a class at -inf, or the row is spoiled anyway
                if (excludes && !kReverse) m = sum_of_differences(row);
                bool row_is_fine = zs > 0 && zt > 0;        // neither NaN nor a row wholly at -inf
                if (kForward && job.kind != KDLAB_TOTAL_VARIATION) {
                    f.s = all<V>(R(g_kl / zs));
                    f.t = all<V>(R(g_kl / zt));
                    kl = row_is_fine ? m / zt / job.T + std::log(zs / zt) : NAN;
                    if (excludes && kl == kl && excludes_more(row)) kl = INFINITY;
                    else if (is_close(row, kl, zs, zt, z)) kl = close_row(row, zs, zt, g_kl, f);
                    if (kSoftCE)
                        kl += FamilyRows<KDLAB_SOFT_CROSS_ENTROPY, V>(job, temperature, x)
                                  .entropy_of(real(row), max_of(z.top_t), z.entropy.total(), zt, excludes);
                } else if (!row_is_fine || (kReverse && excludes && excludes_more(row))) {
                    f.s = f.t = all<V>(NAN);
                    kl = row_is_fine ? INFINITY : NAN;
                } else {
                    kl = family(real(row), {zs, zt, m, max_of(z.top_s), max_of(z.top_t), z.raised || excludes}, g_kl, f);
                }
            }
            job.write_row(r, kl, ce);
        }
        if (pending)
            along_row<V>(cols, [&](int64_t i) { give<false>(pending + i, 0, gradient_at(x, i, f), job.stream); },
                         [&](int64_t i, int n) { store_part(pending + i, n, gradient_at(x, i, f)); }, [] {});
        stream_end();
    }
};

}  // namespace KDLAB_ISA
