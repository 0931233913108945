// The divergences other than the forward KL over rows with many classes, from what the sweep of wide_rows.h leaves: the
// exponentials, their sums and the logits. Included once per instruction set.
namespace KDLAB_ISA {

template <class V>
struct Scratch { Real<V> *es, *et, *h; };

// A sum over a row: a few vectors are added in their own precision, then the lanes go on in double.
template <class V> class RowSum;
template <>
class RowSum<F32> {
    F32 part = {};
    F64 low = {}, high = {};
public:
    void add(F32 x) { part = part + x; }
    void carry() {
        carry(part);
        part = F32{};
    }
    void carry(F32 sum) {
        low = low + low_half(sum);
        high = high + high_half(sum);
    }
    double total() const { return sum_of(low + high); }
};
template <>
class RowSum<F64> {
    F64 all = {};
public:
    void add(F64 x) { all = all + x; }
    void carry() {}
    void carry(F64 sum) { all = all + sum; }
    double total() const { return sum_of(all); }
};
constexpr int carry_every = 8;

// Calls body(i) for whole vectors, tail(i, n) for the last n elements, and after every few vectors carry().
template <class V, int kEvery = carry_every, class Body, class Tail, class Carry>
inline void along_row(int64_t cols, Body body, Tail tail, Carry carry) {
    constexpr int64_t step = kEvery * lanes<V>;
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

// A vector of a row without one class, if that is among its own; `at` counts from the vector's first.
template <class V>
inline V without(int64_t at, V v, V nothing) {
    if (static_cast<uint64_t>(at) >= static_cast<uint64_t>(lanes<V>)) return v;
    Real<V> x[lanes<V>], y[lanes<V>];
    store(x, v);
    store(y, nothing);
    x[at] = y[at];
    return load(x);
}

// A row as the forms below read it, and what the sweep has summed up
template <class V>
struct RealRow {
    const Real<V> *s, *t;
    Real<V> from_s, from_t;                                 // the references
};
template <class V>
struct RowSums {
    double zs, zt, m;
    V top_s, top_t;                                         // largest logits, in some lane
    bool rough;                                             // was a reference changed, or a class excluded?
};

constexpr int most_e = 4;                                   // the largest exponential

// What the value of a mixture tends to where student and teacher have nothing in common
inline double most_apart(int kind, double a) {
    return kind == KDLAB_JSD ? -a * std::log(a) - (1 - a) * std::log(1 - a) : -std::log(a);
}

template <int kKind, class V>
class FamilyRows {
    static constexpr bool kReverse = kKind == KDLAB_REVERSE_KL;
    typedef Real<V> R;

    const Job& job;
    const int64_t cols;
    const Temperature<V>& temperature;
    const Scratch<V> x;
    const double largest;                                   // what most_apart says of this divergence
    const V low = all<V>(-INFINITY);

    // The sums of the row's exponentials again, with all their digits. They replace those in the scratch.
    KDLAB_OUT_OF_LINE void remake(const RealRow<V>& row, double& zs, double& zt) const {
        const V from_s = all<V>(row.from_s), from_t = all<V>(row.from_t);
        RowSum<V> s, t;
        auto one = [&](V a, V b, int64_t i) {
            V es = careful_exp(a, from_s, temperature), et = careful_exp(b, from_t, temperature);
            store(x.es + i, es);
            store(x.et + i, et);
            s.add(es);
            t.add(et);
        };
        along_row<V>(cols, [&](int64_t i) { one(load(row.s + i), load(row.t + i), i); },
                     [&](int64_t i, int n) { one(load_part(row.s + i, n, low), load_part(row.t + i, n, low), i); },
                     [&] { s.carry(); t.carry(); });
        zs = s.total();
        zt = t.total();
    }

    // Where the largest logit of the student is
    int64_t place_of(const R* s, R top) const {
        constexpr int64_t block = 8 * lanes<V>;
        for (int64_t i = 0; i < cols; i += block) {
            V most = low;
            const int64_t end = i + block < cols ? i + block : cols;
            for (int64_t j = i; j < end; j += lanes<V>)
                most = max(j + lanes<V> <= end ? load(s + j) : load_part(s + j, static_cast<int>(end - j), low), most);
            if (max_of(most) < top) continue;
            for (int64_t j = i; j < end; ++j)
                if (s[j] == top) return j;
        }
        return 0;
    }

    // The forms of a divergence other than the forward KL. Which one a row needs is what experiments say for an error of
    // 1e-6: values carry about 2e-8 whatever their size, and slopes 1e-7, against which their differences count.
    enum class Form { near, sure, apart };

    bool is_near(double kl, double top) const {
        if (sizeof(R) == 8) return kl * bend() < 1e-3;
        if (is_mixture(kKind)) return needs_care() || kl * bend() < (kKind == KDLAB_JSD ? 0.01 : 0.03) + 0.05 * std::sqrt(top);
        return kl < 0.03 + 0.16 * std::sqrt(top);
    }
    // Are the slopes where the student has mass so little apart that the fast form cannot tell them?
    bool needs_care() const {
        constexpr double least = has_quick_log2<V> ? 0.06 : 0.25, most = has_quick_log2<V> ? 0.6 : 0.25;
        return (kKind == KDLAB_JSD && job.mix < least) || (kKind == KDLAB_SKEW_REVERSE_KL && job.mix > most) || job.mix == 1;
    }
    // Is it enough to be careful with the logarithms?
    bool is_flat() const { return (kKind == KDLAB_JSD && job.mix < 0.25) || (kKind == KDLAB_SKEW_REVERSE_KL && job.mix > 0.25); }
    static bool is_sure(double top_s) { return top_s > (kReverse ? 0.4 : 0.5); }
    bool is_apart(double value, bool near) const {
        if (!is_mixture(kKind) || (kKind == KDLAB_SKEW_KL && !near)) return false;
        return value > (kKind == KDLAB_SKEW_REVERSE_KL ? 0.65 : 0.75) * largest;
    }

    // How much the value bends with log(p_s / p_t), where they are equal
    double bend() const {
        if (kKind == KDLAB_JSD) return job.mix * (1 - job.mix);
        return is_mixture(kKind) ? (1 - job.mix) * (1 - job.mix) : 1;
    }

    // A divergence in careful form. Leaves q (slope - that of the student's likeliest class) in the place of e_t: where
    // that class has nearly all the mass, the slopes of the others are small next to its own. The exponentials fix
    // log(Z_s / Z_t) to their rounding only; M = sum p (e^v - 1), which should be 0, says by how much v is off, and
    // what that does to the value is taken back.
    KDLAB_OUT_OF_LINE double careful_row(const RealRow<V>& row, R top, double zs, double zt, Form form, double g, Factors<V>& f) const {
        const bool sure = form == Form::sure;
        if (sure || form == Form::apart || kReverse) remake(row, zs, zt);     // the others still are what the sweep made
        const double c = double(row.from_s) - double(row.from_t) + job.T * std::log(zs / zt);
        Close<V> k = {}, to_top = {};
        k.c = all<V>(R(c));
        k.c_error = all<V>(R(c - double(R(c))));
        k.inverse_T = to_top.inverse_T = all<V>(R(1 / job.T));
        const Mix<V> mix(job.mix);
        const V ps = all<V>(R(1 / zs)), pt = all<V>(R(1 / zt)), zero = V{};
        auto pair = [&](V s, V t, int64_t i) {
            return compare<kKind>(load(x.et + i) * pt, load(x.es + i) * ps, k.w(s, t) - k.lambda);
        };
        if (kKind == KDLAB_TOTAL_VARIATION) {               // its slope is a sign: v must be right before
            RowSum<V> mass;
            auto one = [&](V s, V t, int64_t i) { mass.add(pair(s, t, i).d); };
            along_row<V>(cols, [&](int64_t i) { one(load(row.s + i), load(row.t + i), i); },
                         [&](int64_t i, int n) { one(load_part(row.s + i, n, low), load_part(row.t + i, n, low), i); },
                         [&] { mass.carry(); });
            k.lambda = all<V>(R(std::log1p(mass.total())));
        }
        bool apart = form == Form::apart;
        V at_top = zero;
        if (sure || kReverse) {
            const int64_t j = place_of(row.s, top);
            const Difference<V> top_of(all<V>(row.s[j]), all<V>(row.t[j]));
            to_top.c = top_of.difference;
            to_top.c_error = top_of.error;
            const V q = all<V>(x.es[j]) * ps, p = all<V>(x.et[j]) * pt;
            apart = is_mixture(kKind) && x.et[j] / zt < 0.5 * (x.es[j] / zs);
            at_top = slope_of(compare<kKind>(p, q, k.w(all<V>(row.s[j]), all<V>(row.t[j])) - k.lambda), mix, apart);
        }
        R slope_at_top[lanes<V>];
        store(slope_at_top, at_top);
        if (kReverse) at_top = zero;                        // slopes come relative to it, without rounding error
        RowSum<V> mass, value, mean;
        auto one = [&](V s, V t, int64_t i) {
            const Pair<V> both = pair(s, t, i);
            const Share<V> share = share_of<kKind>(both, mix);
            V slope = share.slope;
            if constexpr (kReverse) slope = both.q > zero ? to_top.w(s, t) : zero;
            if constexpr (is_mixture(kKind)) if (apart) slope = slope_apart<kKind>(both, mix);
            slope = both.q * (slope - at_top);
            store(x.et + i, slope);
            mass.add(both.d);
            value.add(share.value);
            mean.add(slope);
        };
        along_row<V>(cols, [&](int64_t i) { one(load(row.s + i), load(row.t + i), i); },
                     [&](int64_t i, int n) { one(load_part(row.s + i, n, low), load_part(row.t + i, n, low), i); },
                     [&] { mass.carry(); value.carry(); mean.carry(); });
        const double S = mean.total(), M = mass.total();
        f.s = all<V>(R(-g * S / zs));
        f.t = all<V>(R(-g));
        if (kKind == KDLAB_TOTAL_VARIATION || apart) return value.total();
        return value.total() - M * (S + slope_at_top[0]) + bend() * M * M / 2;
    }

    static V slope_of(const Pair<V>& x, const Mix<V>& mix, bool apart) {
        if constexpr (is_mixture(kKind)) if (apart) return slope_apart<kKind>(x, mix);
        return share_of<kKind>(x, mix).slope;
    }

    // The second pass of an ordinary row, when the sums of the exponentials are known.
    KDLAB_OUT_OF_LINE double ordinary_row(const RealRow<V>& row, double zs, double zt, double kl, double g, Factors<V>& f) const {
        RowSum<V> slope, to_s, to_t;
        if (kKind == KDLAB_TOTAL_VARIATION) {               // slope 0 where q > p, else -1
            const V ps = all<V>(R(1 / zs)), pt = all<V>(R(1 / zt)), zero = V{};
            along_row<V>((cols + lanes<V> - 1) / lanes<V> * lanes<V>, [&](int64_t i) {       // all is 0 behind the end
                V es = load(x.es + i), d = fma(es, ps, -(load(x.et + i) * pt)), below = d > zero ? zero : es;
                store(x.et + i, below);
                slope.add(below);
                to_s.add(abs(d));
            }, [](int64_t, int) {}, [&] { slope.carry(); to_s.carry(); });
            f.t = all<V>(R(g / zs));
            f.s = all<V>(R(g / zs * (slope.total() / zs)));
            return to_s.total() / 2;
        }
        if constexpr (has_quick_log2<V> && (kKind == KDLAB_JSD || kKind == KDLAB_SKEW_REVERSE_KL))
            if (is_flat()) return mixed_row<kKind == KDLAB_JSD, true>(row, zs, zt, kl, g, f);
        if constexpr (kKind == KDLAB_JSD) if (kl < most_for_jsd && most_e / std::fmin(zs, zt) < 0.4) return mixed_row<true>(row, zs, zt, kl, g, f);
        if constexpr (is_mixture(kKind)) return mixed_row<false>(row, zs, zt, kl, g, f);
        return 0;
    }
    static constexpr double most_for_jsd = 2;               // where the rounding of the KL does not show in the JSD, if no class has most of the mass

    // The same for a mixture. Only what its value and slope need is added up.
    template <bool kFromKL, bool kFine = false>
    KDLAB_OUT_OF_LINE double mixed_row(const RealRow<V>& row, double zs, double zt, double kl, double g, Factors<V>& f) const {
        constexpr bool kTeacher = kKind == KDLAB_SKEW_KL || (kKind == KDLAB_JSD && !kFromKL);      // are its logits read?
        const double a = job.mix, rest = 1 - a;
        const double z = kKind == KDLAB_SKEW_KL ? zt : zs, ratio = zt / zs;
        const double of_s = (kKind == KDLAB_SKEW_REVERSE_KL ? a : rest) * (z / zs), of_t = (kKind == KDLAB_SKEW_REVERSE_KL ? rest : a) * (z / zt);
        const Mixture<V> k = {all<V>(R(of_s)), all<V>(R(of_t)), all<V>(R(-of_s * log2_of_e)), all<V>(R(ratio))};
        const V from_s = all<V>(row.from_s), from_t = all<V>(row.from_t);
        RowSum<V> slope, share;
        MixedSums<V> part = {};
        const R *const row_s = row.s, *const row_t = row.t, *const x_es = x.es;       // all of these in registers
        R* const x_et = x.et;
        const Temperature<V> T = temperature;
        auto one = [&](V s, V t, int64_t i) {
            store(x_et + i, add_mixed<kKind, kFromKL, kFine>(s - from_s, t - from_t, load(x_es + i), load(x_et + i), k, T, part));
        };
        along_row<V, 2 * carry_every>(cols, [&](int64_t i) { one(load(row_s + i), kTeacher ? load(row_t + i) : from_t, i); },
            [&](int64_t i, int n) {
                one(load_part(row_s + i, n, from_s), kTeacher ? load_part(row_t + i, n, from_t) : from_t, i);
            }, [&] {
                slope.carry(part.slope);
                share.carry(part.share);
                part = MixedSums<V>();
            });
        const double factor = kKind == KDLAB_SKEW_KL ? -rest : kKind == KDLAB_JSD ? rest / log2_of_e : 1 / log2_of_e;
        f.t = all<V>(R(-g * factor / zs));
        f.s = all<V>(R(-g * factor / zs * (slope.total() / zs)));
        const double to_s = (kKind == KDLAB_JSD ? slope : share).total() / zs / log2_of_e;
        const double to_t = share.total() / zt / log2_of_e + (kFromKL ? kl : kKind == KDLAB_JSD ? std::log1p((double(R(ratio)) - ratio) / ratio) : 0);
        const double value = kKind == KDLAB_JSD ? a * to_t + rest * to_s : kKind == KDLAB_SKEW_KL ? to_t : to_s;
        return value + (double(R(of_s)) - of_s) * (zs / z) + (double(R(of_t)) - of_t) * (zt / z);        // m was off by so much
    }

public:
    FamilyRows(const Job& j, const Temperature<V>& T, const Scratch<V>& scratch, double apart = 0)
        : job(j), cols(j.cols), temperature(T), x(scratch), largest(apart) {}

    // The teacher's entropy, if need be without the label's class. Where one class has most of its mass, from the others:
    // log Z_t would cancel.
    KDLAB_OUT_OF_LINE double entropy_of(const RealRow<V>& row, R top, double sum_of_logits, double zt, bool excludes, int64_t label = -1) const {
        const double most = std::exp((double(top) - double(row.from_t)) / job.T);
        if (most < 0.3 * zt && !excludes) return std::log(zt) - sum_of_logits / zt / job.T;
        const V from = all<V>(top), one_more = all<V>(1);
        RowSum<V> others, sum, tops;
        auto one = [&](V t) {
            V e = careful_exp(t, from, temperature);
            sum.add(e * max(temperature.floor, t - from));
            others.add(t < from ? e : V{});
            tops.add(t < from ? V{} : one_more);
        };
        along_row<V>(cols, [&](int64_t i) { one(without(label - i, load(row.t + i), low)); },
                     [&](int64_t i, int n) { one(without(label - i, load_part(row.t + i, n, low), low)); },
                     [&] { sum.carry(); others.carry(); tops.carry(); });
        const double rest = others.total() + (tops.total() - 1);
        return std::log1p(rest) - sum.total() / (1 + rest) / job.T;
    }

    // Value and gradient of a row whose sums are these
    double value(const RealRow<V>& row, const RowSums<V>& z, double g, Factors<V>& f) const {
        const double zs = z.zs, zt = z.zt, m = z.m;
        const double kl = kReverse ? -m / zs / job.T - std::log(zs / zt) : m / zt / job.T + std::log(zs / zt);
        const bool rough = kReverse ? std::fabs(m / zs / job.T) > 8 : is_mixture(kKind) && z.rough;
        const double no_top_above = most_e / std::fmin(zs, zt);
        bool near = false;
        R top = 0;
        if (!(no_top_above < 0.4 && std::isfinite(kl) && !rough && !is_near(kl, no_top_above))) {     // look closer
            top = max_of(z.top_s);
            const double top_s = std::exp((double(top) - double(row.from_s)) / job.T) / zs;
            const double top_t = std::exp((double(max_of(z.top_t)) - double(row.from_t)) / job.T) / zt;
            if (is_sure(top_s)) return careful_row(row, top, zs, zt, Form::sure, g, f);
            near = !std::isfinite(kl) || rough || is_near(kl, std::fmax(top_s, top_t));
        }
        if (near || !kReverse) {
            const double value = near ? careful_row(row, top, zs, zt, Form::near, g, f) : ordinary_row(row, zs, zt, kl, g, f);
            return is_apart(value, near) ? careful_row(row, max_of(z.top_s), zs, zt, Form::apart, g, f) : value;
        }
        f.t = all<V>(R(g / job.T / zs));                    // slope = (a - b) / T + const
        f.s = all<V>(R(g / job.T / zs * (m / zs)));
        return kl;
    }
};

}  // namespace KDLAB_ISA
