// Gram matrices of samples, and the gradient that comes back from them. Included once per instruction set.
//
// A piece of columns is copied into the cache, widened, masked and centred on the way; then a tile of rows meets another,
// lanes along the columns. A sum goes on in double after each piece.
namespace KDLAB_ISA {

template <class V>
class GramPiece {
    typedef Real<V> R;
    const GramJob& job;

    R* row(int k, int64_t r) const { return static_cast<R*>(job.packed[k]) + r * job.stride; }

    // Memory meanwhile brings the next row.
    template <class E>
    void widen(const E* x, int64_t n, R* to) const {
        typedef VecOf<E> From;
        for (int64_t i = 0; i < n; i += lanes<From>) {
            fetch(x + i + job.columns);
            const From v = i + lanes<From> <= n ? load(x + i) : load_part(x + i, static_cast<int>(n - i), From{});
            if constexpr (lanes<From> == lanes<V>) store(to + i, v);
            else in_double(v, v, [&](int at, F64 half, F64) { store(to + i + at, half); });
        }
    }
    void widen(const void* x, int dtype, int64_t at, R* to) const {
        if constexpr (sizeof(R) == 8)
            if (dtype == KDLAB_F64) return widen(static_cast<const double*>(x) + at, job.width, to);
        if (dtype == KDLAB_F32) return widen(static_cast<const float*>(x) + at, job.width, to);
        if (dtype == KDLAB_BF16) return widen(static_cast<const bf16*>(x) + at, job.width, to);
        widen(static_cast<const f16*>(x) + at, job.width, to);
    }

    template <class E>
    static void put_vector(E* to, V x, int64_t n, bool past_cache) {
        if constexpr (std::is_same<V, VecOf<E>>::value) {
            if (n >= lanes<V>) give<false>(to, 0, x, past_cache);
            else store_part(to, static_cast<int>(n), x);
        } else {
            R lane[lanes<V>];
            store(lane, x);
            for (int64_t i = 0; i < n && i < lanes<V>; ++i) from_real(static_cast<float>(lane[i]), to + i);
        }
    }
    void put_vector(int64_t r, int64_t column, V x) const {
        const int64_t at = r * job.columns + job.from + column, n = job.width - column;
        if (n <= 0) return;
        if constexpr (sizeof(R) == 8)
            if (job.student_dtype == KDLAB_F64) return put_vector(static_cast<double*>(job.grad) + at, x, n, job.stream);
        if (job.student_dtype == KDLAB_F32) return put_vector(static_cast<float*>(job.grad) + at, x, n, job.stream);
        if (job.student_dtype == KDLAB_BF16) return put_vector(static_cast<bf16*>(job.grad) + at, x, n, false);
        put_vector(static_cast<f16*>(job.grad) + at, x, n, false);
    }

public:
    explicit GramPiece(const GramJob& j) : job(j) {}

    // Rows of the piece: X, or S - T, S + T and T
    void pack(int64_t begin, int64_t end) const {
        for (int64_t r = begin; r < end; ++r) {
            if (!job.counts(r)) {
                for (int k = 0; k < (job.pair() ? 3 : 1); ++k) std::memset(row(k, r), 0, sizeof(R) * job.stride);
                continue;
            }
            R *a = row(0, r), *b = row(1, r), *t = row(2, r);
            widen(job.student, job.student_dtype, r * job.columns + job.from, a);
            if (!job.pair()) continue;
            widen(job.teacher, job.teacher_dtype, r * job.columns + job.from, t);
            for (int64_t i = 0; i < job.width; i += lanes<V>) {
                const V x = load(a + i), y = load(t + i);
                store(a + i, x - y);
                store(b + i, x + y);
            }
        }
    }

    // Takes the mean of the rows that count out of columns, in sixteens.
    void centre(int64_t begin, int64_t end) const {
        const V share = all<V>(R(1 / job.counted));
        for (int64_t i = begin * 16; i < end * 16; i += lanes<V>) {
            V mean = {};
            for (int64_t r = 0; r < job.count; ++r) mean = mean + load(row(0, r) + i);
            mean = mean * share;
            for (int64_t r = 0; r < job.count; ++r)
                if (job.counts(r)) store(row(0, r) + i, load(row(0, r) + i) - mean);
        }
    }

    // Four rows of one side with four of the other
    void tile(const GramJob::Tile& at) const {
        constexpr int64_t together = 64 * lanes<V>;         // columns, before a sum goes on in double
        for (int64_t from = 0; from < job.width; from += together) tile(at, from, std::min(job.width, from + together));
    }
    void tile(const GramJob::Tile& at, int64_t from, int64_t end) const {
        constexpr int rows = sizeof(V) == 64 ? 4 : 2;       // as many sums as there are registers
        for (int64_t i = at.i; i < at.i + 4; i += rows) {
            const R *a[rows], *b[4];
            V sum[rows][4] = {};
            for (int k = 0; k < rows; ++k) a[k] = row(at.teacher ? 2 : 0, i + k);
            for (int k = 0; k < 4; ++k) b[k] = row(at.teacher ? 2 : job.pair() ? 1 : 0, at.j + k);
            for (int64_t c = from; c < end; c += lanes<V>) {
                V x[rows];
                for (int k = 0; k < rows; ++k) x[k] = load(a[k] + c);
                for (int m = 0; m < 4; ++m) {
                    const V y = load(b[m] + c);
                    for (int k = 0; k < rows; ++k) sum[k][m] = fma(x[k], y, sum[k][m]);
                }
            }
            double* out = at.teacher ? job.teacher_gram : job.gram;
            for (int k = 0; k < rows; ++k)
                for (int m = 0; m < 4; ++m)
                    if (i + k < job.count && at.j + m < job.count) {
                        RowSum<V> total;
                        total.carry(sum[k][m]);
                        out[(i + k) * job.count + at.j + m] += total.total();
                    }
        }
    }

    // Gradient of columns, in sixty-fours: weights times the piece
    void product(int64_t begin, int64_t end) const {
        for (int64_t at = begin * 64; at < end * 64; at += 4 * lanes<V>)
            for (int64_t i = 0; i < job.count; i += 4) {
                const R* w = static_cast<const R*>(job.weights) + i;
                V sum[4][4] = {};
                for (int64_t j = 0; j < job.count; ++j, w += job.rows()) {
                    const R* x = row(0, j) + at;
                    for (int m = 0; m < 4; ++m) {
                        const V y = load(x + m * lanes<V>);
                        for (int k = 0; k < 4; ++k) sum[k][m] = fma(all<V>(w[k]), y, sum[k][m]);
                    }
                }
                for (int k = 0; k < 4 && i + k < job.count; ++k)
                    for (int m = 0; m < 4; ++m) put_vector(i + k, at + m * lanes<V>, sum[k][m]);
            }
    }
};

template <class V>
void gram_as(const GramJob& job, int step, int64_t begin, int64_t end) {
    const GramPiece<V> piece(job);
    if (step == GramJob::pack) return piece.pack(begin, end);
    if (step == GramJob::centring) return piece.centre(begin, end);
    if (step == GramJob::product) return piece.product(begin, end);
    for (int64_t i = begin; i < end; ++i) piece.tile(job.tiles[i]);
}

// One step of one piece: rows, columns in sixteens, tiles, or columns in sixty-fours
inline void gram(const GramJob& job, int step, int64_t begin, int64_t end) {
    FlushDenormals flush;
    if (job.wide == KDLAB_F64) gram_as<F64>(job, step, begin, end);
    else gram_as<F32>(job, step, begin, end);
    stream_end();
}

}  // namespace KDLAB_ISA
