// The angles of relational distillation. Included once per instruction set.
//
// At a corner j, the pairs (i, k) and (k, i) are one: the loop takes k from i's tile of eight rows on, in lanes, and whatever
// it adds up goes to i and to k. Inside the tile it takes all pairs, each for i alone. With u = (G_ik - a_i - G_jk) n_jk and
// a_i = G_ij - G_jj, the cosine is n_ij u; with g the slope of smooth L1, d loss / d G_ik = g n_ij n_jk.
namespace KDLAB_ISA {

// Of one corner j: rows [count] that the pairs read, and where they leave sums over i (of d loss / d G_ik, and of g
// times the cosine).
struct Corner {
    int64_t j;
    double *n, *ns, *m, *mt;        // one over the distances from j, and Gram entries times that: student's, teacher's
    double *slope, *inverse;
    F64 loss = {};

    Corner() {}
    Corner(const AngleJob& a, int64_t corner, double* memory) : j(corner) {
        double** rows[] = {&n, &ns, &m, &mt, &slope, &inverse};
        for (double** row : rows) {
            *row = memory;
            memory += a.room();
        }
        distances(a, a.student, a.student_own, n, ns);
        distances(a, a.teacher, a.teacher_own, m, mt);
        for (int64_t k = 0; k < a.room(); ++k) slope[k] = inverse[k] = 0;
    }

private:
    // As `squared_distances` of the reference has them: next to nothing counts as nothing, and so does what is left out.
    void distances(const AngleJob& a, const double* G, const double* own, double* inverse_distance, double* product) const {
        const double *row = G + j * a.count, mine = own[j];
        for (int64_t k = 0; k < a.count; ++k) {
            const double size = own[k] + mine, square = size - 2 * row[k];
            const bool same = square <= 64 * 2.220446049250313e-16 * size;
            const double inverse = 1 / std::sqrt(same ? 1 : square);
            inverse_distance[k] = same ? 0 : inverse;
        }
        for (int64_t k = 0; a.mask && k < a.count; ++k)
            if (!(a.mask[j] && a.mask[k])) inverse_distance[k] = 0;
        for (int64_t k = 0; k < a.count; ++k) product[k] = row[k] * inverse_distance[k];
        for (int64_t k = a.count; k < a.room(); ++k) inverse_distance[k] = product[k] = 0;
    }
};

// What a corner and row i have in common, and the same sums over k.
struct Arm {
    const double *n_row, *ns_row, *m_row, *mt_row;
    double *slope_row, *inverse_row;
    F64 a, n, b, m, own = {}, value = {}, slope = {}, inverse = {};

    Arm(const AngleJob& job, const Corner& c, int64_t i)
        : n_row(c.n), ns_row(c.ns), m_row(c.m), mt_row(c.mt), slope_row(c.slope), inverse_row(c.inverse),
          a(all<F64>(job.student[i * job.count + c.j] - job.student_own[c.j])), n(all<F64>(c.n[i])),
          b(all<F64>(job.teacher[i * job.count + c.j] - job.teacher_own[c.j])), m(all<F64>(c.m[i])) {}

    // Adds to the loss and to this row's sums, outside the tile to k's as well; `sum` with what belongs to G_ik. As many
    // additions as products: there are units for each.
    template <bool kGrad, bool kTile>
    F64 pair(F64 Gik, F64 Hik, int64_t k, F64 sum) {
        const F64 n_k = load(n_row + k), u = fma(Gik - a, n_k, -load(ns_row + k));
        const F64 v = fma(Hik - b, load(m_row + k), -load(mt_row + k)), d = fma(n, u, -(m * v)), g = at_most_1(d);
        (kTile ? own : value) = fma(g, d - g + d, kTile ? own : value);
        if (!kGrad) return sum;
        const F64 gn = g * n, c = gn * n_k, along = gn * u;
        slope = slope + c;
        inverse = inverse + along;
        if (!kTile) {
            store(slope_row + k, load(slope_row + k) + c);
            store(inverse_row + k, load(inverse_row + k) + along);
        }
        return sum + c;
    }

    template <bool kGrad>
    void finish(Corner& c, int64_t i) const {
        c.loss = c.loss + fma(all<F64>(0.5), own, value);
        if (!kGrad) return;
        c.slope[i] += sum_of(slope);
        c.inverse[i] += sum_of(inverse);
    }
};

// Row i: every entry of the Gram matrices is loaded once for all these corners.
template <bool kGrad, class... Corners>
inline void pairs_of_row(const AngleJob& a, int64_t i, double* part, Corners&... corners) {
    const int64_t B = a.count, tile = i - i % AngleJob::tile, next = std::min(B, tile + AngleJob::tile);
    const double *Gi = a.student + i * B, *Hi = a.teacher + i * B;
    double* out = kGrad ? part + a.row_of_part(i) : nullptr;
    auto with_arms = [&](auto... arms) {
        auto step = [&](auto in_tile, int64_t k, F64 Gik, F64 Hik) {
            F64 sum = kGrad ? load(out + k) : F64{};
            ((sum = arms.template pair<kGrad, decltype(in_tile)::value>(Gik, Hik, k, sum)), ...);
            if (kGrad) store(out + k, sum);
        };
        auto along = [&](auto in_tile, int64_t k, int64_t end) {
            for (; k + lanes<F64> <= end; k += lanes<F64>) step(in_tile, k, load(Gi + k), load(Hi + k));
            const int left = static_cast<int>(end - k);
            if (left > 0) step(in_tile, k, load_part(Gi + k, left, F64{}), load_part(Hi + k, left, F64{}));
        };
        along(std::true_type(), tile, next);
        along(std::false_type(), next, B);
        (arms.template finish<kGrad>(corners, i), ...);
    };
    with_arms(Arm(a, corners, i)...);
}

// Corners [begin, end), which stay in the second cache together with a few rows of what they add to.
template <bool kGrad>
void corners_at(const AngleJob& a, int64_t begin, int64_t end, double* part, double* diagonal, double* memory) {
    constexpr int64_t beside = sizeof(F64) == 64 ? 2 : 1;   // corners that registers have room for
    const int64_t B = a.count, rows = std::max(AngleJob::tile, 4096 / a.room());
    Corner corners[AngleJob::together];
    for (int64_t j = begin; j < end; ++j) corners[j - begin] = Corner(a, j, memory + 6 * (j - begin) * a.room());
    for (int64_t first = 0; first < B; first += rows)
        for (int64_t c = 0; c < end - begin; c += beside)
            for (int64_t i = first; i < std::min(B, first + rows); ++i) {
                if constexpr (beside == 2)
                    if (c + 1 < end - begin) {
                        pairs_of_row<kGrad>(a, i, part, corners[c], corners[c + 1]);
                        continue;
                    }
                pairs_of_row<kGrad>(a, i, part, corners[c]);
            }
    for (const Corner* c = corners; c < corners + (end - begin); ++c) {
        a.rows[c->j] = sum_of(c->loss);
        // From c and from n_ij to the entries that they were made of: G_ij, also as G_jk of the pair seen from k, G_jj, G_ii.
        for (int64_t i = 0; kGrad && i < B; ++i) {
            const double slope = c->slope[i], inverse = c->n[i] * c->n[i] * c->inverse[i];
            a.grad[c->j * B + i] = 2 * (inverse - slope);
            diagonal[c->j] += slope - inverse;
            diagonal[i] -= inverse;
        }
    }
}

template <bool kGrad>
void angle_blocks(const AngleJob& a, int64_t begin, int64_t end, double* memory) {
    for (int64_t b = begin; b < end; ++b) {
        double *part = kGrad ? a.parts + b * a.part_size() : nullptr, *diagonal = kGrad ? a.diagonals + b * a.count : nullptr;
        if (kGrad) {
            std::memset(part, 0, sizeof(double) * a.part_size());
            std::memset(diagonal, 0, sizeof(double) * a.count);
        }
        const int64_t last = a.count * (b + 1) / a.blocks;
        for (int64_t j = a.count * b / a.blocks; j < last; j += a.corners())
            corners_at<kGrad>(a, j, std::min(last, j + a.corners()), part, diagonal, memory);
    }
}

// The corners of blocks [begin, end)
inline void angles(const AngleJob& a, int64_t begin, int64_t end, void* scratch) {
    FlushDenormals flush;
    double* memory = static_cast<double*>(scratch);
    if (a.grad) angle_blocks<true>(a, begin, end, memory);
    else angle_blocks<false>(a, begin, end, memory);
}

}  // namespace KDLAB_ISA
