// Losses on features: hint, direction, cosine, attention transfer. Included once per instruction set.
//
// A sample is read once for its sums, and once more, from its end, for its gradient: what was read last is still in
// the cache. Products are made in the precision of the input, and sums go on in double. Loops that only read ask the second
// cache for what comes next: requests to the first one, or further ahead, made them slower.
namespace KDLAB_ISA {

constexpr int64_t read_ahead = 1024;                        // bytes of what is read next
template <class E>
inline void fetch_ahead(const E* p) { fetch(reinterpret_cast<const char*>(p) + read_ahead); }

// Hint: value = mean of d^2, gradient 2 d / n, with d = s - t. One sweep.
template <class E>
double hint(const E* s, const E* t, E* grad, int64_t n, double scale, bool past_cache) {
    typedef VecOf<E> V;
    const V factor = all<V>(Real<V>(2 * scale / n)), zero = {};
    RowSum<V> sum;
    along_row<V>(n,
        [&](int64_t i) {
            V d = load(s + i) - load(t + i);
            sum.add(d * d);
            fetch_ahead(s + i);
            fetch_ahead(t + i);
            if (grad) give<false>(grad + i, 0, d * factor, past_cache);
        },
        [&](int64_t i, int k) {
            V d = load_part(s + i, k, zero) - load_part(t + i, k, zero);
            sum.add(d * d);
            if (grad) store_part(grad + i, k, d * factor);
        },
        [&] { sum.carry(); });
    return sum.total() / n;
}

// Two vectors by their sums. t stands for the teacher times a power of two that brings both to about one length: this
// loses nothing, and near agreement everything comes from d = s - t, which is exact there.
//
//     |s| - |t| = sum d (s + t) / (|s| + |t|),   k = (|s| - |t|) / |t|,   s/|s| - t/|t| = (d - k t) / |s|
struct Directions {
    double scale = 1;           // of the teacher
    double s = 0, t = 0;        // lengths
    double k = 0;
    double gap = 0;             // |s/|s| - t/|t||^2 = 2 (1 - cos)

    bool exist() const { return s != 0 && t != 0; }                         // a zero vector has none
    bool similar() const { return !exist() || !(s > 2 * t || t > 2 * s); }  // in length; also with NaN or infinity
    double better_scale() const { return similar() ? scale : scale * std::exp2(std::rint(std::log2(s / t))); }
};

template <class E>
Directions directions(const E* s, const E* t, int64_t n, double scale) {
    typedef VecOf<E> V;
    const V zero = {}, factor = all<V>(Real<V>(scale));
    RowSum<V> ss, tt, dd, ds;
    auto add = [&](V a, V teacher) {
        V b = teacher * factor, d = a - b;
        ss.add(a * a);
        tt.add(b * b);
        dd.add(d * d);
        ds.add(d * (a + b));
    };
    along_row<V>(n,
        [&](int64_t i) {
            add(load(s + i), load(t + i));
            fetch_ahead(s + i);
            fetch_ahead(t + i);
        },
        [&](int64_t i, int k) { add(load_part(s + i, k, zero), load_part(t + i, k, zero)); },
        [&] { ss.carry(); tt.carry(); dd.carry(); ds.carry(); });
    Directions x;
    x.scale = scale;
    x.s = std::sqrt(ss.total());
    x.t = std::sqrt(tt.total());
    if (!x.exist()) return x;
    const double longer = ds.total() / (x.s + x.t);
    x.k = longer / x.t;
    x.gap = (dd.total() - longer * longer) / (x.s * x.t);
    if (x.gap < 0) x.gap = 0;
    return x;
}

// The scale comes from the first few elements; the whole vector seldom disagrees.
template <class E>
Directions directions(const E* s, const E* t, int64_t n) {
    const int64_t few = 256;
    Directions x = directions(s, t, n, directions(s, t, std::min(n, few), 1).better_scale());
    return x.similar() ? x : directions(s, t, n, x.better_scale());
}

// Calls body(i) for whole vectors from the last to the first, after tail(i, n) for the last n elements.
template <class V, class Body, class Tail>
inline void back_along_row(int64_t n, Body body, Tail tail) {
    const int64_t end = n - n % lanes<V>;
    if (end < n) tail(end, static_cast<int>(n - end));
    for (int64_t i = end; i > 0; i -= lanes<V>) body(i - lanes<V>);
}

// Gradient of scale * gap: 2 scale / |s|^2 (d - k t - s gap / 2)
template <class E>
void direction_gradient(const E* s, const E* t, E* grad, int64_t n, const Directions& x, double scale, bool past_cache) {
    typedef VecOf<E> V;
    typedef Real<V> R;
    const V factor = all<V>(R(2 * scale / (x.s * x.s))), k = all<V>(R(-x.k)), q = all<V>(R(-x.gap / 2)), zero = {},
            scale_t = all<V>(R(x.scale));
    auto gradient = [&](V a, V teacher) {
        V b = teacher * scale_t;
        return fma(q, a, fma(k, b, a - b)) * factor;
    };
    back_along_row<V>(n,
        [&](int64_t i) { give<false>(grad + i, 0, gradient(load(s + i), load(t + i)), past_cache); },
        [&](int64_t i, int m) { store_part(grad + i, m, gradient(load_part(s + i, m, zero), load_part(t + i, m, zero))); });
}

// Direction: gap / n, where a zero vector stays zero. Cosine: gap / 2, or 1 where an angle does not exist.
template <class E>
double direction(const E* s, const E* t, E* grad, int64_t n, double scale, bool cosine, bool past_cache) {
    const Directions x = directions(s, t, n);
    if (!x.exist()) {
        if (grad) std::memset(grad, 0, n * sizeof(E));
        return cosine ? 1 + 0 * (x.s + x.t) : ((x.s != 0) + (x.t != 0)) / double(n) + 0 * (x.s + x.t);
    }
    const double part = cosine ? 0.5 : 1.0 / n;
    if (grad) direction_gradient(s, t, grad, n, x, scale * part, past_cache);
    return x.gap * part;
}

inline void add_to(double* p, F64 x) { store(p, load(p) + x); }
inline void add_to(double* p, F32 x) {
    constexpr int half = lanes<F64>;
    store(p, load(p) + low_half(x));
    if (half < lanes<F32>) store(p + half, load(p + half) + high_half(x));
}

// map[p] += sum over kChannels channels of x^2, from one pixel on to the end
template <int kChannels, class E>
void add_squares(const E* x, int64_t pixels, double* map) {
    typedef VecOf<E> V;
    const V zero = {};
    auto squares = [&](auto take_at) {
        V sum = take_at(0) * take_at(0);
        for (int c = 1; c < kChannels; ++c) sum = fma(take_at(c), take_at(c), sum);
        return sum;
    };
    const int64_t end = pixels - pixels % lanes<V>;
    for (int64_t p = 0; p < end; p += lanes<V>) {
        add_to(map + p, squares([&](int c) { return load(x + c * pixels + p); }));
        for (int c = 0; c < kChannels; ++c) fetch(x + (c + kChannels) * pixels + p);
    }
    const int n = static_cast<int>(pixels - end);
    if (n) add_to(map + end, squares([&](int c) { return load_part(x + c * pixels + end, n, zero); }));
}

// The channel mean of squares
template <class E>
void square_map(const E* x, int64_t channels, int64_t pixels, double* map) {
    std::memset(map, 0, sizeof(double) * ((pixels + 15) / 16 * 16));
    int64_t c = 0;
    for (; c + 8 <= channels; c += 8) add_squares<8>(x + c * pixels, pixels, map);
    for (; c < channels; ++c) add_squares<1>(x + c * pixels, pixels, map);
    for (int64_t p = 0; p < pixels; ++p) map[p] /= channels;
}

// Adaptive average pooling, as torch has it: cell i of m averages [i n / m, ceil((i + 1) n / m)) of n. Calls
// visit(cell, pixel, share) for each pixel of each cell.
template <class Visit>
void pool(const int64_t* shape, int64_t height, int64_t width, Visit visit) {
    const int64_t h = shape[1], w = shape[2];
    for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) {
            const int64_t top = i * h / height, bottom = ((i + 1) * h + height - 1) / height;
            const int64_t left = j * w / width, right = ((j + 1) * w + width - 1) / width;
            const double share = 1.0 / double((bottom - top) * (right - left));
            for (int64_t y = top; y < bottom; ++y)
                for (int64_t x = left; x < right; ++x) visit(i * width + j, y * w + x, share);
        }
}

inline double sum_over(int64_t n, const double* a, const double* b) {
    double sum = 0;
    for (int64_t p = 0; p < n; ++p) sum += a[p] * b[p];
    return sum;
}

// map / |map| in place, and |map|; a zero map stays zero.
inline double normalise(double* map, int64_t n) {
    const double length = std::sqrt(sum_over(n, map, map));
    for (int64_t p = 0; p < n; ++p) map[p] = length == 0 ? 0 * map[p] : map[p] / length;
    return length;
}

// Attention transfer. With u the student's map, a = u/|u|, b the teacher's, g = a - b, over n pixels:
//
//     value = mean g^2,   d value / d u = 2 / (n |u|) (g - a (a . g)),   d u / d s = 2 s / channels
template <class E>
class Attention {
    typedef VecOf<E> V;
    typedef Real<V> R;
    const FeatureJob& job;
    const int64_t pixels, cells;
    double *student, *teacher, *pooled_student, *pooled_teacher, *slope;
    R* factor;

    static double* pooled(const double* map, const int64_t* shape, const FeatureJob& job, double* room) {
        std::memset(room, 0, sizeof(double) * job.height() * job.width());
        pool(shape, job.height(), job.width(), [&](int64_t cell, int64_t p, double share) { room[cell] += share * map[p]; });
        return room;
    }
    bool same(const int64_t* shape) const { return shape[1] == job.height() && shape[2] == job.width(); }

    // What every channel of s is multiplied by, pixel by pixel
    void set_factor(const double* a, const double* b, double length, double scale) {
        double along = 0;
        for (int64_t p = 0; p < cells; ++p) along += a[p] * (a[p] - b[p]);
        const double k = length == 0 ? 0 : scale * 4 / (double(cells) * length * job.student_shape[0]);
        auto by_cell = [&](int64_t p) { return k * (a[p] - b[p] - a[p] * along); };
        if (same(job.student_shape)) {
            for (int64_t p = 0; p < pixels; ++p) factor[p] = R(by_cell(p));
            return;
        }
        std::memset(slope, 0, sizeof(double) * pixels);
        pool(job.student_shape, job.height(), job.width(),
             [&](int64_t cell, int64_t p, double share) { slope[p] += share * by_cell(cell); });
        for (int64_t p = 0; p < pixels; ++p) factor[p] = R(slope[p]);
    }

    // Backwards, as the end is in the cache; meanwhile memory brings what is read next.
    void gradient(const E* s, E* grad, const E* next) const {
        const V zero = {};
        for (int64_t c = job.student_shape[0] - 1; c >= 0; --c, next += pixels) {
            const E* x = s + c * pixels;
            E* g = grad + c * pixels;
            back_along_row<V>(pixels,
                [&](int64_t p) {
                    give<false>(g + p, 0, load(x + p) * load(factor + p), job.stream);
                    fetch(next + p);
                },
                [&](int64_t p, int n) { store_part(g + p, n, load_part(x + p, n, zero) * load(factor + p)); });
        }
    }

public:
    Attention(const FeatureJob& j, void* memory)
        : job(j), pixels(j.student_pixels()), cells(j.height() * j.width()) {
        double* m = static_cast<double*>(memory);
        double** maps[] = {&student, &teacher, &pooled_student, &pooled_teacher, &slope};
        for (double** map : maps) {
            *map = m;
            m += j.map_room();
        }
        factor = reinterpret_cast<R*>(m);
    }

    double run(const E* s, const E* t, E* grad, double scale) {
        square_map(t, job.teacher_shape[0], job.teacher_pixels(), teacher);
        square_map(s, job.student_shape[0], pixels, student);
        double* a = same(job.student_shape) ? student : pooled(student, job.student_shape, job, pooled_student);
        double* b = same(job.teacher_shape) ? teacher : pooled(teacher, job.teacher_shape, job, pooled_teacher);
        const double length = normalise(a, cells);
        normalise(b, cells);
        double sum = 0;
        for (int64_t p = 0; p < cells; ++p) sum += (a[p] - b[p]) * (a[p] - b[p]);
        if (grad) {
            set_factor(a, b, length, scale);
            gradient(s, grad, t + job.teacher_size);
        }
        return sum / cells;
    }
};

template <class E>
void features_as(const FeatureJob& job, int64_t begin, int64_t end, void* scratch) {
    const int64_t n = job.student_size;
    for (int64_t i = begin; i < end; ++i) {
        const E* s = static_cast<const E*>(job.student) + i * n;
        const E* t = static_cast<const E*>(job.teacher) + i * job.teacher_size;
        E* grad = job.grad ? static_cast<E*>(job.grad) + i * n : nullptr;
        if (!job.counts(i)) {
            job.values[i] = 0;
            if (grad) std::memset(grad, 0, n * sizeof(E));
            continue;
        }
        const double scale = job.grad_scale(i);
        if (job.loss == KDLAB_HINT) job.values[i] = hint(s, t, grad, n, scale, job.stream);
        else if (job.loss == KDLAB_ATTENTION) job.values[i] = Attention<E>(job, scratch).run(s, t, grad, scale);
        else job.values[i] = direction(s, t, grad, n, scale, job.loss == KDLAB_COSINE, job.stream);
    }
    stream_end();
}

inline void features(const FeatureJob& job, int64_t begin, int64_t end, void* scratch) {
    FlushDenormals flush;
    switch (job.dtype) {
        case KDLAB_F32: return features_as<float>(job, begin, end, scratch);
        case KDLAB_F64: return features_as<double>(job, begin, end, scratch);
        case KDLAB_BF16: return features_as<bf16>(job, begin, end, scratch);
        case KDLAB_F16: return features_as<f16>(job, begin, end, scratch);
    }
}

}  // namespace KDLAB_ISA
