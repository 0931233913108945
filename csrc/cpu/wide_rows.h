// Softened divergences and cross-entropy of rows with many classes (logit_mse: with any number): lanes are classes. Included once per instruction set.
//
// One sweep over memory does two things at once: the exponentials and sums of this row (kept in scratch), and the
// gradient of the row before, from scratch. Each input is read from memory once, and reading, arithmetic and writing
// overlap. Nothing is spent on finding the maxima first: exponentials are relative to a reference, the maximum of the
// row's first elements. Where the row exceeds it by much, its maximum so far becomes the new reference, and what was
// made with older ones is brought up to date at the end. Rows where the fast form is too coarse are then done again in
// close form, or careful form. But where the first elements say that student and teacher nearly agree, the sweep for the
// forward KL is made in near form, and is mostly all that is needed.
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
    R apart;                                // about s - t, where the row is tried in near form
    int64_t label;                          // the class that is set apart, if the divergence does
};

// What a part of a row adds up to; `entropy` is the sum of e_t b. In near form zs is the sum of e_t psi(w), m that of
// e_t (e^w - 1). NKD: zh_t is to the teacher what zh is to the student. logit_mse: m is the sum of s - t, zs that of its squares.
template <class V>
struct Part { V zs, zt, m, zh, entropy, zh_t; };

template <class V>
inline Part<V> operator+(const Part<V>& x, const Part<V>& y) {
    return {x.zs + y.zs, x.zt + y.zt, x.m + y.m, x.zh + y.zh, x.entropy + y.entropy, x.zh_t + y.zh_t};
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
    RelativeSum<V> zs, zt, m, zh, entropy, zh_t;
    V top_s = all<V>(-INFINITY), top_t = top_s;             // maxima of the row so far
    V top_w = V{}, top_change = V{};                        // in near form: of |w| and of e_t |e^w - 1|
    bool raised = false;                                    // was the reference changed?

    template <int kSweep, bool kCE>
    void carry(const Part<V>& p) {
        if (kSweep != only_cross_entropy) { zs.carry(p.zs); zt.carry(p.zt); m.carry(p.m); }
        if (kSweep == KDLAB_SOFT_CROSS_ENTROPY || kSweep == KDLAB_NKD) entropy.carry(p.entropy);
        if (kSweep == KDLAB_NKD) zh_t.carry(p.zh_t);
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
inline void give_pair(E* p, V x, V y, bool past_cache, bool) {
    give<false>(p, 0, x, past_cache);
    give<false>(p + lanes<V>, 0, y, past_cache);
}

// kSweep is the divergence, or another that needs the same sums: the forward KL for total variation, JSD for a mixture.
template <int kSweep, bool kCE, class E>
class WideRows {
    static constexpr bool kKL = kSweep != only_cross_entropy && kSweep != KDLAB_LOGIT_MSE, kReverse = kSweep == KDLAB_REVERSE_KL;
    static constexpr bool kSoftCE = kSweep == KDLAB_SOFT_CROSS_ENTROPY, kLabel = kSweep == KDLAB_DKD || kSweep == KDLAB_NKD;
    static constexpr bool kNKD = kSweep == KDLAB_NKD, kMSE = kSweep == KDLAB_LOGIT_MSE;
    static constexpr bool kForward = kSweep == KDLAB_FORWARD_KL || kSoftCE;
    typedef VecOf<E> V;
    typedef Real<V> R;
    static constexpr bool kNears = kSweep == KDLAB_FORWARD_KL && sizeof(R) == 4;        // has it a near form?

    const Job& job;
    const int64_t cols, padded, end;
    const Temperature<V> temperature, one{1.0};
    Scratch<V> x;
    double largest;                                         // the value of a mixture
    R margin;                                               // by how much a row may exceed its reference, so that it is
    int64_t few;                                            // the maximum of so many elements. The wider the margin, the fewer do
    struct Reference { R s, t; } *references;               // of each step along the row
    // Logits are prefetched into the first cache, or the second: faster by a tenth where that holds the scratch as well,
    // but not for short rows, nor for halves of a float.
    const bool second_cache;
    const V low = all<V>(-INFINITY);
    static constexpr int64_t step = (lanes<V> < 16 ? 16 : 32) * lanes<V>, short_sum = (lanes<V> < 16 ? 8 : 16) * lanes<V>;

    Row<E> row_at(int64_t r) const {
        Row<E> row = {};
        row.s = static_cast<const E*>(job.student) + r * job.student_stride;
        row.t = kKL || kMSE ? static_cast<const E*>(job.teacher) + r * job.teacher_stride : row.s;
        row.grad = job.grad ? static_cast<E*>(job.grad) + r * cols : nullptr;
        if (kLabel) row.label = job.target[r];
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
        along_row<V>(cols < few ? cols : few,
            [&](int64_t i) {
                s = max(hidden(load(row.s + i), row.label - i, low), s);
                if (kKL) t = max(hidden(load(row.t + i), row.label - i, low), t);
            },
            [&](int64_t i, int n) {
                s = max(hidden(load_part(row.s + i, n, low), row.label - i, low), s);
                if (kKL) t = max(hidden(load_part(row.t + i, n, low), row.label - i, low), t);
            }, [] {});
        row.from_s = std::fmax(max_of(s), Scalar<V>::least);                     // finite, so that -inf is far below
        row.from_t = std::fmax(max_of(t), Scalar<V>::least);
    }

    // Is the row to be tried in near form? Then `apart` is the mean of s - t over its first elements.
    bool looks_near(Row<E>& row) const {
        constexpr int few = 64;
        if (cols < few) return false;
        const V first = all<V>(to_real(row.s[0]) - to_real(row.t[0]));
        const R most = R(0.5) * series_range<V> * R(job.T);
        if (!(max_of(abs(load(row.s) - load(row.t) - first)) < most)) return false;      // the ordinary case
        V sum = V{}, farthest = V{};
        for (int i = 0; i < few; i += lanes<V>) {
            const V d = load(row.s + i) - load(row.t + i);
            sum = sum + d;
            farthest = max(abs(d - first), farthest);
        }
        row.apart = R((sum_of(low_half(sum)) + sum_of(high_half(sum))) / few);
        return max_of(farthest) < most && std::isfinite(row.apart);
    }

    // A vector without the label's class, if the divergence sets it apart
    static V hidden(V v, int64_t label, V nothing) { return kLabel ? without(label, v, nothing) : v; }

    // From now on the maxima so far are the references.
    template <bool kNear>
    void raise_references(Row<E>& row, Sums<V>& z) const {
        const Row<E> old = row;
        row.from_s = std::fmax(row.from_s, max_of(z.top_s));
        double up_s = double(row.from_s) - double(old.from_s);
        if (kKL) {
            row.from_t = std::fmax(row.from_t, max_of(z.top_t));
            double up_t = double(row.from_t) - double(old.from_t), zs = z.zs.total(), zt = z.zt.total();
            double fall_t = std::exp(-up_t / job.T), fall_s = kNear ? fall_t : std::exp(-up_s / job.T);
            double more = kNear ? 0 : (up_s - up_t) * (kReverse ? zs : zt);
            z.m.replace((z.m.total() + more) * (kReverse ? fall_s : fall_t));
            z.top_change = z.top_change * R(fall_t);
            z.entropy.replace((z.entropy.total() - up_t * zt) * fall_t);
            z.zt.replace(zt * fall_t);
            z.zs.replace(zs * fall_s);
            if (kNKD) z.zh_t.replace(z.zh_t.total() * std::exp(-up_t));
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
    template <bool kNear>
    void bring_up_to_date(const Row<E>& row) const {
        const Reference* from = references;
        for (int64_t i = 0; i < cols; i += step, ++from) {
            const int64_t n = cols - i < step ? cols - i : step;
            const R up_s = row.from_s - from->s, up_t = row.from_t - from->t;
            if (kReverse) lower_differences(i, n, up_s, up_s - up_t);
            if (kKL) lower(x.es + i, n, kNear ? up_t : up_s, temperature);
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
    // lies behind the row's end counts nothing. kPower: T, where e^a is made from e^(a/T); else 0.
    template <bool kGrad, bool kNear, int kPower>
    Part<V> part(const Row<E>& row, E* grad, const Factors<V>& factors, int64_t begin, int64_t end, Sums<V>& z) const {
        const E *const row_s = row.s, *const row_t = row.t;                      // all of these in registers
        const V from_s = all<V>(row.from_s), from_t = all<V>(row.from_t);
        const Scratch<V> x = this->x;
        const Temperature<V> T = temperature;
        const Factors<V> f = factors;
        const V none_s = nothing_to(row.from_s), none_t = nothing_to(kMSE ? row.from_s : row.from_t);
        const bool past_cache = job.stream, rounds_bf16 = job.rounds_bf16;
        const bool second_cache = this->second_cache;
        const V apart = all<V>(row.apart), inverse_T = all<V>(R(1 / job.T));
        V top_s = z.top_s, top_t = z.top_t, top_w = z.top_w, top_change = z.top_change;
        auto exponentials = [&](int64_t i, V s, V t, Part<V>& p) KDLAB_INLINE {
            V a = s - from_s;
            if (!kNear || kCE) top_s = max(s, top_s);
            if (kNear) {
                const Difference<V> d(s, t);
                const V et = quick_exp<true>(t - from_t, T), w = ((d.difference - apart) + d.error) * inverse_T;
                const V above = psi(w), change = et * (w + above);
                top_t = max(t, top_t);
                top_w = max(abs(w), top_w);
                top_change = max(abs(change), top_change);
                p.zs = fma(et, above, p.zs);
                p.zt = p.zt + et;
                p.m = p.m + change;
                store(x.es + i, change);
                store(x.et + i, et);
            } else if (kKL) {
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
                if (kSoftCE || kNKD) p.entropy = fma(et, b, p.entropy);
                store(x.es + i, es);
                store(x.et + i, et);
            }
            if (kMSE) {
                V d = s - t;
                store(x.es + i, d);
                p.zs = fma(d, d, p.zs);
                p.m = p.m + d;
            }
            if (kCE) {
                V h = kPower ? load(x.es + i) : quick_exp(a, one);
                for (int k = kPower; k > 1; k /= 2) h = h * h;
                store(x.h + i, h);
                p.zh = p.zh + h;
                if (kNKD) {
                    V h_t = kPower ? load(x.et + i) : quick_exp(t - from_t, one);
                    for (int k = kPower; k > 1; k /= 2) h_t = h_t * h_t;
                    p.zh_t = p.zh_t + h_t;
                }
            }
        };
        constexpr int64_t L = lanes<V>;
        Part<V> sum = {}, rest = {};
        int64_t i = begin;
        while (i + 2 * L <= end) {
            Part<V> even = {}, odd = {};                    // sums of few terms round less
            for (const int64_t stop = end - i < short_sum ? end : i + short_sum; i + 2 * L <= stop; i += 2 * L) {
                if (kGrad) give_pair(grad + i, gradient_at(x, i, f), gradient_at(x, i + L, f), past_cache, rounds_bf16);
                V s[2], t[2] = {};
                load_pair(row_s + i, s[0], s[1]);
                ask_ahead(row_s + i, second_cache);
                if (kKL || kMSE) {
                    load_pair(row_t + i, t[0], t[1]);
                    ask_ahead(row_t + i, second_cache);
                }
                if (kLabel && static_cast<uint64_t>(row.label - i) < static_cast<uint64_t>(2 * L)) {
                    for (int j = 0; j < 2; ++j) {
                        s[j] = hidden(s[j], row.label - i - j * L, none_s);
                        t[j] = hidden(t[j], row.label - i - j * L, none_t);
                    }
                }
                exponentials(i, s[0], t[0], even);
                exponentials(i + L, s[1], t[1], odd);
            }
            sum = sum + (even + odd);
        }
        if (i + L <= end) {
            if (kGrad) give<false>(grad + i, 0, gradient_at(x, i, f), past_cache);
            exponentials(i, hidden(load(row_s + i), row.label - i, none_s), hidden(load(row_t + i), row.label - i, none_t), rest);
            i += L;
        }
        if (i < end) {
            const int n = static_cast<int>(end - i);
            if (kGrad) store_part(grad + i, n, gradient_at(x, i, f));
            V no_s = none_s, no_t = none_t;
            if (kNear) {                                    // with a small w
                no_t = all<V>(row.from_t - R(110) * std::fmax(R(1), R(job.T)));
                no_s = no_t + apart;
            }
            exponentials(i, hidden(load_part(row_s + i, n, no_s), row.label - i, no_s),
                         hidden(load_part(row_t + i, n, no_t), row.label - i, no_t), rest);
        }
        z.top_s = top_s;
        z.top_t = top_t;
        z.top_w = top_w;
        z.top_change = top_change;
        return sum + rest;
    }

    // What adds nothing to the sums: finite where it can be, because 0 * -inf would look like an excluded class.
    static V nothing_to(R from) { return all<V>(from > Scalar<V>::lowest / 2 ? Scalar<V>::lowest : R(-INFINITY)); }

    static V gradient_at(const Scratch<V>& x, int64_t i, const Factors<V>& f) {
        if constexpr (kMSE) return kCE ? fma(load(x.h + i), f.h, load(x.es + i) * f.s) : load(x.es + i) * f.s;
        else return fast_gradient<kKL, kCE>(load(x.es + i), load(x.et + i), load(x.h + i), f);
    }

    // Exponentials and sums of `row`, and the gradient of the row before if there is one
    template <bool kNear, int kPower>
    Sums<V> sweep(Row<E>& row, E* grad, const Factors<V>& f) const {
        Sums<V> z;
        bool raised = false;
        Reference* from = references;
        for (int64_t begin = 0; begin < cols; begin += step) {
            const int64_t end = begin + step < cols ? begin + step : cols;
            const V top_change = z.top_change;
            Part<V> p = grad ? part<true, kNear, kPower>(row, grad, f, begin, end, z)
                             : part<false, kNear, kPower>(row, grad, f, begin, end, z);
            if ((kKL || kCE) && max_of(max(z.top_s - row.from_s, z.top_t - row.from_t)) > margin) {
                raised = true;
                z.top_change = top_change;                  // this part counts anew
                raise_references<kNear>(row, z);
                p = part<false, kNear, kPower>(row, grad, f, begin, end, z);
            }
            *from++ = {row.from_s, row.from_t};
            z.template carry<kSweep, kCE>(p);
        }
        if (raised) bring_up_to_date<kNear>(row);
        z.raised = raised;
        return z;
    }

    Sums<V> ordinary_sweep(Row<E>& row, E* grad, const Factors<V>& f) const {
        if constexpr (kCE && (kSweep == KDLAB_FORWARD_KL || kNKD)) {
            if (job.T == 1) return sweep<false, 1>(row, grad, f);
            if (job.T == 2) return sweep<false, 2>(row, grad, f);
            if (job.T == 4) return sweep<false, 4>(row, grad, f);
        }
        return sweep<false, 0>(row, grad, f);
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

    // T log(Z_s / Z_t), as the exponentials have it, with the difference of the references
    double distance(const Row<E>& row, double zs, double zt) const {
        return double(row.from_s) - double(row.from_t) + job.T * std::log(zs / zt);
    }

    // KL of the row in close form, with c = distance and lambda = 0: M = sum p_t (e^w - 1) is about 0 here. p_t (e^w - 1)
    // takes the place of e_s, so that the gradient is made as for every row, from p_s - p_t =
    // (p_t (e^w - 1) - M p_t) / (1 + M). After a sweep in near form M may still be too large beside that; then NaN.
    template <bool kNear>
    double close_row(const Row<E>& row, double c, double zs, double zt, double top, double& M) const {
        Close<V> k = {};
        k.c = all<V>(R(c));
        k.c_error = all<V>(R(c - double(R(c))));
        k.inverse_T = all<V>(R(1 / job.T));
        k.pt = all<V>(R(1 / zt));
        k.ps = all<V>(R(1 / zs));
        RowSum<V> mass, value;
        V most = V{};
        auto one = [&](V s, V t, int64_t i) {
            prefetch(row.s + job.student_stride + i);       // of the next row, while memory would be idle
            prefetch(row.t + job.teacher_stride + i);
            const V et = load(x.et + i), es = kNear ? load(x.es + i) + et : load(x.es + i);
            CloseTerms<V> terms = close_terms(s, t, es, et, k);
            store(x.es + i, terms.gradient);
            if (kNear) most = max(abs(terms.gradient), most);
            mass.add(terms.gradient);
            value.add(terms.value);
        };
        along_row<V>(cols, [&](int64_t i) { one(load(row.s + i), load(row.t + i), i); },
                     [&](int64_t i, int n) { one(load_part(row.s + i, n, low), load_part(row.t + i, n, low), i); },
                     [&] { mass.carry(); value.carry(); });
        M = mass.total();
        if (kNear && max_of(most) < 2 * top * std::fabs(M)) return NAN;
        return value.total() + (std::log1p(M) - M);
    }

    // What makes the gradient of a row in close form
    static void close_factors(double g, double M, double zt, Factors<V>& f) {
        f.s = all<V>(R(g / (1 + M)));
        f.t = all<V>(R(g * M / (1 + M) / zt));
    }

    // KL of the row after a sweep in near form. With w = v + lambda, M = sum p_t (e^w - 1) = e^lambda - 1, and KL and
    // gradient are as in close form. Where lambda is not small beside the largest v that matters, they would lose digits
    // in it: then the row is done again with lambda taken out. NaN: this is not the form for it.
    double near_row(const Row<E>& row, const Sums<V>& z, double kl_grad, Factors<V>& f) const {
        if (!(max_of(z.top_w) < series_range<V> && std::isfinite(z.m.total()))) return NAN;
        const double zt = z.zt.total(), M = z.m.total() / zt, lambda = std::log1p(M);
        const double above = z.zs.total() / zt, kl = above - (M - lambda);
        const double top = max_of(softened_exp(z.top_t - row.from_t, temperature));
        if (kl < 0.5 * above || max_of(z.top_change) < 2 * top * std::fabs(M)) {
            double rest;
            const double value = close_row<true>(row, row.apart + job.T * lambda, zt * (1 + M), zt, top / zt, rest);
            close_factors(kl_grad, rest, zt, f);
            return value;
        }
        f.s = all<V>(R(kl_grad / zt / (1 + M)));
        f.t = all<V>(R(kl_grad / zt / (1 + M) * M));
        return kl;
    }

    // Does the student exclude a class (-inf) that the teacher does not? Then KL is +inf. For the reverse KL: the teacher.
    bool excludes_more(const Row<E>& row) const {
        const E *out = kReverse ? row.t : row.s, *in = kReverse ? row.s : row.t;
        for (int64_t i = 0; i < cols; ++i)
            if (to_real(out[i]) == -INFINITY && to_real(in[i]) > -INFINITY && !(kLabel && i == row.label)) return true;
        return false;
    }

    // DKD, from the sums over all classes but the label. The label's place in the scratch is free, and gets what makes its
    // gradient.
    double decoupled(const Row<E>& row, double zs, double zt, double m, bool excludes, const Sums<V>& z, double g, Factors<V>& f) const {
        const double s = double(to_real(row.s[row.label])), t = double(to_real(row.t[row.label]));
        R &es = x.es[row.label], &et = x.et[row.label];
        es = et = 0;
        if (zs == 0 && zt == 0) {                           // no other class: both parts are 0, unless there is no class at all
            const double nothing = std::isfinite(s) && std::isfinite(t) ? 0 : NAN;
            f.s = f.t = all<V>(R(nothing));
            return nothing;
        }
        const double l_t = (t - double(row.from_t)) / job.T - std::log(zt);
        double l_s = (s - double(row.from_s)) / job.T - std::log(zs), D = l_s - l_t, M = 0;
        double nckd = zs > 0 && zt > 0 ? m / zt / job.T + std::log(zs / zt) : NAN;
        bool close = false;
        if (excludes && nckd == nckd && excludes_more(row)) nckd = INFINITY;
        else close = is_close(row, nckd, zs, zt, z);
        if (close) {
            const double c = distance(row, zs, zt);
            nckd = close_row<false>(row, c, zs, zt, 1, M);
            const Difference<double> d(s, t);
            if (std::isfinite(d.difference)) {
                D = ((d.difference - c) + d.error) / job.T - std::log1p(M);
                l_s = l_t + D;
            }
        }
        if (kNKD) nckd += FamilyRows<KDLAB_SOFT_CROSS_ENTROPY, V>(job, temperature, x)
                              .entropy_of(real(row), max_of(z.top_t), z.entropy.total(), zt, excludes, row.label);
        const bool excluded = s == -INFINITY && t > -INFINITY;                    // then NKD has no end, however small p_y is
        const Coin tckd = kNKD ? Coin{excluded ? INFINITY : 0, s < INFINITY && t < INFINITY ? 0 : NAN} : toss<R>(l_s, l_t, D);
        const double alpha = kNKD ? 1 : job.mix, of_label = alpha * tckd.slope, at_label = g * of_label;
        const double of_s = close ? g * (job.others - of_label) / (1 + M) : g * (job.others - of_label) / zs;
        const double of_t = close ? g * (job.others * M + of_label) / (1 + M) / zt : g * job.others / zt;
        f.s = all<V>(R(of_s));
        f.t = all<V>(R(of_t));
        if (std::fabs(of_s) > std::fabs(of_t)) es = R(at_label / of_s);
        else if (of_t != 0) et = R(-at_label / of_t);
        return alpha * tckd.value + alpha * tckd.slope * 0 + job.others * nckd;
    }

    // The teacher's, at T = 1, from the sum over the other classes
    double probability_of_label(const Row<E>& row, double others) const {
        const double t = double(to_real(row.t[row.label])), odds = double(row.from_t) - t + std::log(others);
        return others == 0 ? 1 : t < INFINITY ? 1 / (1 + std::exp(odds)) : NAN;
    }

    // Sum of the squares of s - t, or of what is left of that without its mean; leaves the differences in the place of e_s.
    double squares(const Row<E>& row, const Sums<V>& z, double g, Factors<V>& f) const {
        const double sum = z.zs.total();
        f.s = all<V>(R(g));
        if (!std::isfinite(sum)) return infinite_squares(row);
        if (job.mix == 0) return sum;
        const double mean = z.m.total() / cols;
        const V high = all<V>(R(mean)), rest = all<V>(R(mean - double(R(mean)))), none = V{};
        RowSum<V> left, square;                             // what is left has its own mean, of rounding errors
        auto one = [&](V s, V t, int64_t i) {
            const Difference<V> d(s, t);
            V y = (d.difference - high) + (d.error - rest);
            store(x.es + i, y);
            return y;
        };
        along_row<V>(cols, [&](int64_t i) { left.add(one(load(row.s + i), load(row.t + i), i)); },
            [&](int64_t i, int n) {
                one(load_part(row.s + i, n, none), load_part(row.t + i, n, none), i);
                left.add(load_part(x.es + i, n, none));
            }, [&] { left.carry(); });
        const V shift = all<V>(R(left.total() / cols));
        auto centre = [&](int64_t i, int n) {
            V y = load(x.es + i) - shift;
            store(x.es + i, y);
            if (n < lanes<V>) y = load_part(x.es + i, n, none);
            square.add(y * y);
        };
        along_row<V>(cols, [&](int64_t i) { centre(i, lanes<V>); }, [&](int64_t i, int n) { centre(i, n); }, [&] { square.carry(); });
        return square.total();
    }

    // The same, one class at a time, where a class is at -inf. One that both exclude is not there.
    KDLAB_OUT_OF_LINE double infinite_squares(const Row<E>& row) const {
        auto at = [&](const E* p, int64_t i) { return double(to_real(p[i])); };
        auto absent = [&](int64_t i) { return at(row.s, i) == -INFINITY && at(row.t, i) == -INFINITY; };
        auto one_sided = [&](int64_t i) { return (at(row.s, i) == -INFINITY) != (at(row.t, i) == -INFINITY); };
        double mean = 0, sum = 0, left = 0;
        int64_t n = 0;
        for (int64_t i = 0; i < cols; ++i) {
            if (absent(i)) continue;
            ++n;
            if (!one_sided(i)) mean += at(row.s, i) - at(row.t, i);
        }
        mean = job.mix == 0 || n == 0 ? 0 : mean / n;
        for (int64_t i = 0; i < cols; ++i) {
            const double d = absent(i) ? 0 : at(row.s, i) - at(row.t, i) - mean;
            sum += d * d;
            left += d;
            x.es[i] = R(d);
        }
        if (job.mix != 0)                                   // the mean's own part in the gradient; it is 0 but for infinite rows
            for (int64_t i = 0; i < cols; ++i)
                if (!absent(i) && !one_sided(i)) x.es[i] -= R(left / n);
        return sum;
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
        if constexpr (kReverse) return FamilyRows<KDLAB_REVERSE_KL, V>(job, temperature, x, largest).value(row, z, g, f);
        switch (job.kind) {
            case KDLAB_JSD: return FamilyRows<KDLAB_JSD, V>(job, temperature, x, largest).value(row, z, g, f);
            case KDLAB_SKEW_KL: return FamilyRows<KDLAB_SKEW_KL, V>(job, temperature, x, largest).value(row, z, g, f);
            case KDLAB_SKEW_REVERSE_KL: return FamilyRows<KDLAB_SKEW_REVERSE_KL, V>(job, temperature, x, largest).value(row, z, g, f);
            default: return FamilyRows<KDLAB_TOTAL_VARIATION, V>(job, temperature, x, largest).value(row, z, g, f);
        }
    }

    // The divergence of the row after an ordinary sweep
    double divergence(const Row<E>& row, const Sums<V>& z, double g, Factors<V>& f) const {
        const double zs = z.zs.total(), zt = z.zt.total(), summed = z.m.total();
        const bool excludes = !std::isfinite(summed);       // a class at -inf, or the row is spoiled anyway
        const bool row_is_fine = zs > 0 && zt > 0;          // neither NaN nor a row wholly at -inf
        if constexpr (kLabel) return decoupled(row, zs, zt, excludes ? sum_of_differences(row) : summed, excludes, z, g, f);
        if (kForward && job.kind != KDLAB_TOTAL_VARIATION) {
            const double m = excludes ? sum_of_differences(row) : summed;
            f.s = all<V>(R(g / zs));
            f.t = all<V>(R(g / zt));
            double kl = row_is_fine ? m / zt / job.T + std::log(zs / zt) : NAN;
            if (excludes && kl == kl && excludes_more(row)) kl = INFINITY;
            else if (is_close(row, kl, zs, zt, z)) {
                double M;
                kl = close_row<false>(row, distance(row, zs, zt), zs, zt, 1, M);
                close_factors(g, M, zt, f);
            }
            if (kSoftCE)
                kl += FamilyRows<KDLAB_SOFT_CROSS_ENTROPY, V>(job, temperature, x)
                          .entropy_of(real(row), max_of(z.top_t), z.entropy.total(), zt, excludes);
            return kl;
        }
        if (!row_is_fine || (kReverse && excludes && excludes_more(row))) {
            f.s = f.t = all<V>(NAN);
            return row_is_fine ? INFINITY : NAN;
        }
        const double m = excludes && !kReverse ? sum_of_differences(row) : summed;
        return family(real(row), {zs, zt, m, z.top_s, z.top_t, z.raised || excludes}, g, f);
    }

    // CE with label y. Leaves h_y - Z_h in the place of h_y, so that the gradient is h / Z_h everywhere; from the other
    // classes where the label has most of the mass, because the difference would cancel.
    double hard_label(const Row<E>& row, int64_t y, double& zh) const {
        if (kLabel) {                                       // the sums lack it
            const double s = double(to_real(row.s[y])), odds = double(row.from_s) - s + std::log(zh);
            const double spoil = s < INFINITY ? 0 : NAN;
            x.h[y] = R(-zh);
            zh = zh == 0 ? 1 : zh * (1 + std::exp(-odds)) + spoil;
            return softplus(odds) + spoil;
        }
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
        x = {m, kKL ? m + padded : m, kCE && (kKL || kMSE) ? m + 2 * padded : m};
        references = reinterpret_cast<Reference*>(m + (sizeof(E) < sizeof(R) ? 5 : 3) * padded);
        largest = is_mixture(kSweep) ? most_apart(job.kind, job.mix) : 0;
        margin = R(std::log(most_e) * (kCE && job.T > 1 ? 1 : job.T));
        few = margin > R(2.5) ? 64 : 256;
    }

    void run(int64_t begin) const {
        E* pending = nullptr;                               // where the gradient of the row before goes
        Factors<V> f = {};
        for (int64_t r = next_row(begin); r < end; r = next_row(r + 1)) {
            Row<E> row = row_at(r);
            bool near = false;
            if constexpr (kNears) near = job.kind == KDLAB_FORWARD_KL && looks_near(row);
            Sums<V> z = near ? sweep<kNears, 0>(row, pending, f) : ordinary_sweep(row, pending, f);
            pending = row.grad;
            const double g = job.grad_scale(r), g_kl = g * job.kl_weight * job.kl_factor / job.T;
            double kl = 0, ce = 0, of_label = 0;            // NKD: the teacher's probability of the label, at T = 1
            if constexpr (kNears) {
                if (near) kl = near_row(row, z, g_kl, f);
                if (kl != kl) {
                    near = false;
                    first_references(row);
                    z = ordinary_sweep(row, nullptr, f);
                }
            }
            if (kCE) {
                double zh = z.zh.total(), weight = job.ce_weight;
                ce = hard_label(row, job.target[r], zh);
                if (kNKD) {
                    of_label = probability_of_label(row, z.zh_t.total());
                    weight += job.kl_weight * of_label;
                }
                f.h = all<V>(R(g * weight / zh));
            }
            if (kMSE) kl = squares(row, z, 2 * g * job.kl_weight * job.kl_factor, f);
            if constexpr (kKL)
                if (!near) kl = divergence(row, z, g_kl, f);
            if (kNKD && of_label != 0) kl += of_label * ce / job.kl_factor;
            job.write_row(r, kl, ce);
        }
        if (pending)
            along_row<V>(cols, [&](int64_t i) { give<false>(pending + i, 0, gradient_at(x, i, f), job.stream); },
                         [&](int64_t i, int n) { store_part(pending + i, n, gradient_at(x, i, f)); }, [] {});
        stream_end();
    }
};

}  // namespace KDLAB_ISA
