// Vectors of the AVX2 kernels: 8 floats or 4 doubles. The names are explained in simd_base.h.
namespace KDLAB_ISA {

typedef __m256 F32;
typedef __m256d F64;
typedef int32_t I32 __attribute__((vector_size(32)));
typedef int64_t I64 __attribute__((vector_size(32)));
inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
inline F64 to_float(I64 x) { return __builtin_convertvector(x, F64); }

inline F32 splat(F32, float x) { return _mm256_set1_ps(x); }
inline F64 splat(F64, double x) { return _mm256_set1_pd(x); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F64 fma(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F64 max(F64 a, F64 b) { return _mm256_max_pd(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F64 min(F64 a, F64 b) { return _mm256_min_pd(a, b); }
inline F32 abs(F32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F64 abs(F64 a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }

inline F64 at_most_1(F64 a) { return min(max(a, _mm256_set1_pd(-1)), _mm256_set1_pd(1)); }
inline F64 low_half(F32 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline F64 high_half(F32 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
inline double sum_of(F64 x) {
    __m128d y = _mm256_castpd256_pd128(x) + _mm256_extractf128_pd(x, 1);
    return y[0] + y[1];
}
inline double max_of(F64 x) {
    __m128d y = _mm_max_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return y[0] > y[1] ? y[0] : y[1];
}
inline float max_of(F32 x) { return static_cast<float>(max_of(_mm256_max_pd(low_half(x), high_half(x)))); }

template <class V> constexpr bool has_quick_exp2 = false;
template <class V> constexpr bool has_quick_log2 = false;
template <class V> constexpr bool has_quick_inverse = false;
inline F32 power_of_2(F32 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }
inline F64 power_of_2(F64 x) { return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x), 52)); }

inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline F64 load(const double* p) { return _mm256_loadu_pd(p); }
inline F32 widen(__m128i x, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline F32 widen(__m128i x, f16) { return _mm256_cvtph_ps(x); }
inline F32 load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), bf16()); }
inline F32 load(const f16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), f16()); }

// To the nearest, ties to even; NaN stays NaN.
inline __m128i narrow(F32 v, bf16) {
    __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    __m256i high = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(F32 v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
inline void store(double* p, F64 v) { _mm256_storeu_pd(p, v); }
template <class E>
inline void store(E* p, F32 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, E())); }

inline F32 load_part(const float* p, int n, F32 fill) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
inline F64 load_part(const double* p, int n, F64 fill) {
    __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3), mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane);
    return _mm256_blendv_pd(fill, _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask));
}
template <class E>
inline F32 load_part(const E* p, int n, F32 fill) {
    E part[8] = {};
    for (int i = 0; i < n; ++i) part[i] = p[i];
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    return _mm256_blendv_ps(fill, load(part), _mm256_castsi256_ps(mask));
}
inline void store_part(float* p, int n, F32 v) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), v);
}
inline void store_part(double* p, int n, F64 v) {
    __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    _mm256_maskstore_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane), v);
}
template <class E>
inline void store_part(E* p, int n, F32 v) {
    E part[8];
    store(part, v);
    for (int i = 0; i < n; ++i) p[i] = part[i];
}

inline void stream(float* p, F32 v) { _mm256_stream_ps(p, v); }
inline void stream(double* p, F64 v) { _mm256_stream_pd(p, v); }
template <class E>
inline void stream(E* p, F32 v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v, E())); }

// Two vectors of 16-bit numbers fill one store: halves of it past the cache are slow.
inline void give_both(void* p, __m128i x, __m128i y, bool past_cache) {
    __m256i both = _mm256_set_m128i(y, x);
    if (past_cache) _mm256_stream_si256(static_cast<__m256i*>(p), both);
    else _mm256_storeu_si256(static_cast<__m256i*>(p), both);
}
inline void give_pair(bf16* p, F32 x, F32 y, bool past_cache, bool) {
    give_both(p, narrow(x, bf16()), narrow(y, bf16()), past_cache);
}
inline void give_pair(f16* p, F32 x, F32 y, bool past_cache, bool) {
    give_both(p, narrow(x, f16()), narrow(y, f16()), past_cache);
}

template <class E> constexpr bool has_transpose = sizeof(E) == 4;
inline void transpose(F32 (&r)[8]) {
    F32 t[8];
    for (int i = 0; i < 8; i += 2) {                        // pairs of rows, element by element
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)                          // four rows in each half of a vector
        for (int j = 0; j < 2; ++j) {
            __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        }
    for (int j = 0; j < 4; ++j) {                           // eight
        F32 low = r[j], high = r[j + 4];
        r[j] = _mm256_permute2f128_ps(low, high, 0x20);
        r[j + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + prefetch_ahead, _MM_HINT_T0); }
inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void stream_end() { _mm_sfence(); }

}  // namespace KDLAB_ISA
