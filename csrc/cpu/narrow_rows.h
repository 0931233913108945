// Softened divergences and cross-entropy of rows with few classes: lanes are rows, so nothing is summed across lanes.
// Everything stays in the first-level cache, and the careful form serves every row. Included once per instruction set.
namespace KDLAB_ISA {

constexpr int64_t widest_narrow = 40;

// A sum in each lane, in two steps of few terms, which rounds less than one long sum.
template <class V>
class LaneSum {
    V sum = V{}, part = V{};
    int terms = 0;
public:
    void add(V x) {
        part = part + x;
        if (++terms % 8) return;
        sum = sum + part;
        part = V{};
    }
    V total() const { return sum + part; }
};

// A divergence of as many rows as there are lanes, columns first
template <int kKind, class V>
struct NarrowFamily {
    static constexpr bool kForward = kKind == KDLAB_FORWARD_KL || kKind == KDLAB_SOFT_CROSS_ENTROPY;
    typedef Real<V> R;
    static constexpr int L = lanes<V>;

    const Job& job;
    const int cols;
    const Temperature<V>& temperature;
    R *s, *t, *es, *et;

    // The divergence of each lane; leaves T times its gradient in es, and in k what compares a class of the two.
    KDLAB_OUT_OF_LINE V divergence(V max_s, V max_t, Close<V>& k) const {
        const V low = all<V>(-INFINITY), zero = V{};
        LaneSum<V> sum_s, sum_t, others_t, mass;
        V excludes_more = V{}, top_count = V{}, t_at_top = V{};
        for (int i = 0; i < cols * L; i += L) {
            V a = load(s + i), b = load(t + i), e, f;
            if (kForward) {
                e = softened_exp(a - max_s, temperature);
                f = softened_exp(b - max_t, temperature);
            } else {
                e = careful_exp(a, max_s, temperature);
                f = careful_exp(b, max_t, temperature);
            }
            store(es + i, e);
            store(et + i, f);
            sum_s.add(e);
            sum_t.add(f);
            t_at_top = a < max_s ? t_at_top : b;
            if (kKind == KDLAB_SOFT_CROSS_ENTROPY) {
                others_t.add(b < max_t ? f : zero);
                top_count = b < max_t ? top_count : top_count + Real<V>(1);
            }
            V out = kKind == KDLAB_REVERSE_KL ? b : a, in = kKind == KDLAB_REVERSE_KL ? a : b;
            V is_low = out > low ? V{} : all<V>(1);
            excludes_more = in > low ? max(excludes_more, is_low) : excludes_more;
        }
        const V zs = sum_s.total(), zt = sum_t.total();
        const Difference<V> c(max_s, max_t);
        k = {c.difference, c.error, all<V>(R(1 / job.T)), R(1) / zt, R(1) / zs, R(1) / zt, V{}};
        for (int i = 0; i < cols * L; i += L)
            mass.add(close_mass(load(s + i), load(t + i), load(es + i), load(et + i), k));
        const V m = mass.total();
        k.lambda = abs(m) < R(0.5) ? log1p_of(m) : log_of(zs * k.pt);
        const V spoiled = zs + zt;                          // NaN then
        V value;
        if constexpr (kForward) value = forward(k);
        else value = family(k, Difference<V>(max_s, t_at_top), spoiled * R(0), excludes_more);
        if (kKind == KDLAB_SOFT_CROSS_ENTROPY) value = value + entropy(max_t, k, others_t.total() + (top_count - R(1)));
        constexpr bool unbounded = kForward || kKind == KDLAB_REVERSE_KL;
        return unbounded && excludes_more > zero && spoiled == spoiled ? all<V>(INFINITY) : value;
    }

    V forward(const Close<V>& k) const {
        LaneSum<V> value;
        for (int i = 0; i < cols * L; i += L) {
            CloseTerms<V> terms = close_terms(load(s + i), load(t + i), load(es + i), load(et + i), k);
            value.add(terms.value);
            store(es + i, terms.gradient);
        }
        return value.total();
    }

    // Of the teacher, from the sum of its exponentials but one of the largest
    V entropy(V max_t, const Close<V>& k, V others) const {
        LaneSum<V> sum;
        for (int i = 0; i < cols * L; i += L)
            sum.add(load(et + i) * k.pt * (max(temperature.floor, load(t + i) - max_t) * k.inverse_T));
        return log1p_of(others) - sum.total();
    }

    // Slopes are taken relative to that of the student's likeliest class, because next to it the others are small where
    // it has nearly all the mass.
    V family(const Close<V>& k, const Difference<V>& at_the_top, V spoil, V excludes_more) const {
        const Mix<V> mix(job.mix);
        const V zero = V{};
        const Close<V> to_top = {at_the_top.difference, at_the_top.error, k.inverse_T, V{}, V{}, V{}, V{}};
        LaneSum<V> value, mean;
        V top = all<V>(-1), at_top = V{}, overlap = V{};
        for (int i = 0; i < cols * L; i += L) overlap = overlap + min(load(es + i) * k.ps, load(et + i) * k.pt);
        for (int i = 0; i < cols * L; i += L) {
            V q = load(es + i) * k.ps, p = load(et + i) * k.pt;
            const Pair<V> both = compare<kKind>(p, q, k.w(load(s + i), load(t + i)) - k.lambda);
            const Share<V> share = share_of<kKind>(both, mix);
            V slope = share.slope;
            if constexpr (is_mixture(kKind)) slope = overlap < R(0.4) ? slope_apart<kKind>(both, mix) : slope;
            if constexpr (kKind == KDLAB_REVERSE_KL) slope = q > zero ? to_top.w(load(s + i), load(t + i)) : zero;
            value.add(share.value);
            store(es + i, q);
            store(et + i, slope);
            at_top = q > top ? slope : at_top;
            top = max(q, top);
        }
        for (int i = 0; i < cols * L; i += L) mean.add(load(es + i) * (load(et + i) - at_top));
        V from = mean.total() + spoil;
        if (kKind == KDLAB_REVERSE_KL) from = excludes_more > zero ? all<V>(NAN) : from;
        for (int i = 0; i < cols * L; i += L) store(es + i, load(es + i) * ((load(et + i) - at_top) - from));
        return value.total() + spoil;
    }
};

template <bool kKL, bool kCE, class E>
class NarrowRows {
    typedef VecOf<E> V;
    typedef Real<V> R;
    static constexpr int L = lanes<V>;

    const Job& job;
    const int cols;
    const Temperature<V> temperature, one{1.0};
    R *s, *t, *es, *et, *h;                                 // [cols][lanes]

    // Up to L rows from r on, columns first. Lanes beyond n repeat the last row.
    void gather(const void* matrix, int64_t stride, int64_t r, int n, R* out) const {
        const E* first = static_cast<const E*>(matrix) + r * stride;
        auto row_of = [&](int lane) { return first + (lane < n ? lane : n - 1) * stride; };
        if constexpr (has_transpose<E>) {
            for (int c = 0; c < cols; c += L) {
                const int width = cols - c < L ? cols - c : L;
                V block[L];
                for (int lane = 0; lane < L; ++lane) block[lane] = load_part(row_of(lane) + c, width, V{});
                transpose(block);
                for (int i = 0; i < width; ++i) store(out + (c + i) * L, block[i]);
            }
        } else {
            for (int lane = 0; lane < L; ++lane)
                for (int c = 0; c < cols; ++c) out[c * L + lane] = to_real(row_of(lane)[c]);
        }
    }

    // The way back, into the gradient; zeros where a row does not count.
    void scatter(const R* in, int64_t r, int n, const bool* counts) const {
        E* first = static_cast<E*>(job.grad) + r * cols;
        if constexpr (has_transpose<E>) {
            for (int c = 0; c < cols; c += L) {
                const int width = cols - c < L ? cols - c : L;
                V block[L];
                for (int i = 0; i < L; ++i) block[i] = i < width ? load(in + (c + i) * L) : V{};
                transpose(block);
                for (int lane = 0; lane < n; ++lane)
                    store_part(first + lane * cols + c, width, counts[lane] ? block[lane] : V{});
            }
        } else {
            for (int lane = 0; lane < n; ++lane)
                for (int c = 0; c < cols; ++c) from_real(counts[lane] ? in[c * L + lane] : R(0), first + lane * cols + c);
        }
    }

    V maximum(const R* x) const {
        V m = load(x);
        for (int c = 1; c < cols; ++c) m = max(m, load(x + c * L));
        return m;
    }

    // The divergence of each lane; leaves T times its gradient in es.
    V divergence(V max_s, V max_t) const {
        switch (job.kind) {
            case KDLAB_REVERSE_KL: return of<KDLAB_REVERSE_KL>(max_s, max_t);
            case KDLAB_JSD: return of<KDLAB_JSD>(max_s, max_t);
            case KDLAB_SKEW_KL: return of<KDLAB_SKEW_KL>(max_s, max_t);
            case KDLAB_SKEW_REVERSE_KL: return of<KDLAB_SKEW_REVERSE_KL>(max_s, max_t);
            case KDLAB_TOTAL_VARIATION: return of<KDLAB_TOTAL_VARIATION>(max_s, max_t);
            case KDLAB_SOFT_CROSS_ENTROPY: return of<KDLAB_SOFT_CROSS_ENTROPY>(max_s, max_t);
            default: return of<KDLAB_FORWARD_KL>(max_s, max_t);
        }
    }
    template <int kKind>
    V of(V max_s, V max_t) const {
        Close<V> k;
        return NarrowFamily<kKind, V>{job, cols, temperature, s, t, es, et}.divergence(max_s, max_t, k);
    }

    // DKD of each lane, with its label y: the forward KL of the row without its label, and the label's own question. NKD: the
    // soft cross-entropy of that row. Leaves T times its gradient in es.
    template <int kKind>
    KDLAB_OUT_OF_LINE V decoupled(V y) const {
        constexpr bool kNKD = kKind == KDLAB_NKD;
        const V low = all<V>(-INFINITY), zero = V{}, least = all<V>(Scalar<V>::least);
        V s_y = low, t_y = low;
        for (int c = 0; c < cols; ++c) {
            auto is_label = y == all<V>(R(c));
            V a = load(s + c * L), b = load(t + c * L);
            s_y = is_label ? a : s_y;
            t_y = is_label ? b : t_y;
            store(s + c * L, is_label ? low : a);
            store(t + c * L, is_label ? low : b);
        }
        const V max_s = max(maximum(s), least), max_t = max(maximum(t), least);
        Close<V> k;
        const V nckd = NarrowFamily<kNKD ? KDLAB_SOFT_CROSS_ENTROPY : KDLAB_FORWARD_KL, V>{job, cols, temperature, s, t, es, et}.divergence(max_s, max_t, k);
        const V unending = all<V>(INFINITY), one_more = all<V>(1);
        const V none_s = k.ps == unending ? one_more : zero, none_t = k.pt == unending ? one_more : zero;     // no other class
        const V spoil = s_y < unending && t_y < unending && none_s == none_t ? zero : all<V>(NAN);
        const V nothing = (s_y - s_y) + (t_y - t_y) + spoil;                      // 0, unless the label has no logit either
        const CoinOf<V> tckd = kNKD ? CoinOf<V>{s_y > low ? zero : t_y > low ? unending : zero, zero} : toss(s_y, t_y, max_s, max_t, k, temperature);
        const V alpha = all<V>(R(kNKD ? 1 : job.mix)), beta = all<V>(R(job.others)), pull = alpha * tckd.slope + spoil;
        for (int c = 0; c < cols; ++c) {
            V d = load(es + c * L), q = fma(load(et + c * L), k.pt, d);
            V gradient = y == all<V>(R(c)) ? pull : fma(-pull, q, beta * d);
            store(es + c * L, none_s > zero ? nothing : gradient);
        }
        V value = fma(tckd.slope, zero, spoil);             // a part of weight 0 is not there, even where it is infinite
        if (job.others != 0) value = fma(beta, nckd, value);
        if (kNKD || job.mix != 0) value = fma(alpha, tckd.value, value);
        return none_s > zero ? nothing : value;
    }

    // The teacher's probability of the label, at T = 1
    V probability_of_label(V max_t, V y) const {
        LaneSum<V> others;
        V own = V{};
        for (int c = 0; c < cols; ++c) {
            auto is_label = y == all<V>(R(c));
            V e = softened_exp(load(t + c * L) - max_t, one);
            others.add(is_label ? V{} : e);
            own = is_label ? e : own;
        }
        return own / (own + others.total());
    }

    // CE of each lane; leaves h / Z_h - [class = y] in h.
    V hard_label(V max_s, V y) const {
        LaneSum<V> sum;
        V hy = V{}, ay = V{};
        for (int c = 0; c < cols; ++c) {
            V a = load(s + c * L) - max_s, e = softened_exp(a, one);
            auto is_label = y == all<V>(R(c));
            store(h + c * L, e);
            sum.add(is_label ? V{} : e);
            hy = is_label ? e : hy;
            ay = is_label ? a : ay;
        }
        const V others = sum.total(), zh = others + hy, inverse = R(1) / zh;
        for (int c = 0; c < cols; ++c) {
            auto is_label = y == all<V>(R(c));
            store(h + c * L, (is_label ? -others : load(h + c * L)) * inverse);
        }
        V confident = log1p_of(others / hy), unsure = log_of(zh) - ay;
        return hy > others ? confident : unsure;
    }

public:
    NarrowRows(const Job& j, void* memory) : job(j), cols(static_cast<int>(j.cols)), temperature(j.T) {
        R* m = static_cast<R*>(memory);
        R** parts[] = {&s, &t, &es, &et, &h};
        for (int i = 0; i < 5; ++i) *parts[i] = m + i * cols * L;
    }

    void run(int64_t begin, int64_t end) const {
        for (int64_t r = begin; r < end; r += L) block(r, end - r < L ? static_cast<int>(end - r) : L);
    }

private:
    void block(int64_t r, int n) const {
        R y[L] = {}, scale_kl[L] = {}, scale_ce[L] = {}, scale_label[L] = {};
        double scale = job.kl_weight * job.kl_factor / job.T;
        bool counts[L];
        const bool label = kKL && kdlab_kind_has_label(job.kind);
        for (int lane = 0; lane < n; ++lane) {
            counts[lane] = job.counts(r + lane);
            double g = counts[lane] ? job.grad_scale(r + lane) : 0;
            scale_kl[lane] = R(g * scale);
            scale_ce[lane] = R(g * job.ce_weight);
            scale_label[lane] = R(g * job.kl_weight);
            if (kCE || label) y[lane] = R(counts[lane] ? job.target[r + lane] : 0);
        }
        gather(job.student, job.student_stride, r, n, s);
        V max_s = maximum(s), kl = V{}, ce = V{}, of_h = load(scale_ce);
        if (kCE) ce = hard_label(max_s, load(y));
        if (kKL) {
            gather(job.teacher, job.teacher_stride, r, n, t);
            const V max_t = maximum(t);
            if (job.kind == KDLAB_NKD) {
                const V p = probability_of_label(max_t, load(y)), factor = all<V>(R(1 / job.kl_factor));
                kl = decoupled<KDLAB_NKD>(load(y)) + (p > V{} ? p * ce : p) * factor;
                of_h = fma(load(scale_label), p, of_h);
            } else {
                kl = label ? decoupled<KDLAB_DKD>(load(y)) : divergence(max_s, max_t);
            }
        }

        R kl_of[L], ce_of[L];
        store(kl_of, kl);
        store(ce_of, ce);
        for (int lane = 0; lane < n; ++lane) {
            if (counts[lane]) job.write_row(r + lane, kl_of[lane], ce_of[lane]);
            else job.write_empty_row(r + lane);
        }
        if (!job.grad) return;
        for (int i = 0; i < cols * L; i += L) {
            V g = kKL ? load(es + i) * load(scale_kl) : load(h + i) * of_h;
            if (kKL && kCE) g = fma(load(h + i), of_h, g);
            store(s + i, g);
        }
        scatter(s, r, n, counts);
    }
};

}  // namespace KDLAB_ISA
