// Vectors of the AVX-512 kernels: 16 floats or 8 doubles. The names are explained in simd_base.h.
namespace KDLAB_ISA {

typedef __m512 F32;
typedef __m512d F64;
typedef int32_t I32 __attribute__((vector_size(64)));
typedef int64_t I64 __attribute__((vector_size(64)));
inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
inline F64 to_float(I64 x) { return __builtin_convertvector(x, F64); }

inline F32 splat(F32, float x) { return _mm512_set1_ps(x); }
inline F64 splat(F64, double x) { return _mm512_set1_pd(x); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F64 fma(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F64 max(F64 a, F64 b) { return _mm512_max_pd(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F64 min(F64 a, F64 b) { return _mm512_min_pd(a, b); }
inline F32 abs(F32 a) { return _mm512_abs_ps(a); }
inline F64 abs(F64 a) { return _mm512_abs_pd(a); }
inline F64 at_most_1(F64 a) { return _mm512_range_pd(a, _mm512_set1_pd(1), 0b0010); }
inline F64 low_half(F32 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline F64 high_half(F32 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline double sum_of(F64 x) { return _mm512_reduce_add_pd(x); }
inline float max_of(F32 x) { return _mm512_reduce_max_ps(x); }
inline double max_of(F64 x) { return _mm512_reduce_max_pd(x); }
inline F32 power_of_2(F32 x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }
inline F64 power_of_2(F64 x) { return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x), 52)); }

// 2^(x k), quicker than exp2_of and as good while x k is below 4: the polynomial (minimax, relative error 8e-8, or 5e-9
// where finer) takes what of y = x k + 1/2, or x k, is below the point, the exponent what is above. -inf gives 0.
template <class V> constexpr bool has_quick_exp2 = sizeof(V) / sizeof(V{}[0]) == 16;
inline F32 quick_exp2(F32 x, F32 k, bool finer) {
    F32 y = fma(x, k, _mm512_set1_ps(finer ? 0.0f : 0.5f));
    F32 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    F32 p;
    if (finer) {
        p = fma(_mm512_set1_ps(0.000215659718f), f, _mm512_set1_ps(0.00124822895f));
        p = fma(p, f, _mm512_set1_ps(0.00967377517f));
        p = fma(p, f, _mm512_set1_ps(0.0554861836f));
        p = fma(p, f, _mm512_set1_ps(0.240229085f));
        p = fma(p, f, _mm512_set1_ps(0.693147063f));
        p = fma(p, f, _mm512_set1_ps(1.0f));
    } else {
        p = fma(_mm512_set1_ps(1.327647245e-3f), f, _mm512_set1_ps(6.356423255e-3f));
        p = fma(p, f, _mm512_set1_ps(3.947516903e-2f));
        p = fma(p, f, _mm512_set1_ps(1.698142439e-1f));
        p = fma(p, f, _mm512_set1_ps(4.901332259e-1f));
        p = fma(p, f, _mm512_set1_ps(7.071067095e-1f));
    }
    return _mm512_scalef_ps(p, y);
}

// a b - log2 x for normal positive x, without a division: absolute error 1e-7 times the larger of 1 and the result. The first
// four binary digits of the mantissa choose a number whose inverse and logarithm are in the tables. The logarithms are
// multiples of 2^-18 (to 1e-9), so that they and e add up without rounding; a polynomial takes the rest.
template <class V> constexpr bool has_quick_log2 = sizeof(V) / sizeof(V{}[0]) == 16;
inline F32 log_inverses() {
    return _mm512_setr_ps(
        0.969967902f, 0.914459229f, 0.865077436f, 0.82030344f, 0.780413747f, 0.744427621f, 0.710888028f, 0.680925131f,
        0.652797937f, 0.627492905f, 0.603949189f, 0.581714749f, 0.561356187f, 0.542654872f, 0.524311721f, 0.508181095f);
}
inline F32 logs() {
    return _mm512_setr_ps(
        0.0439910889f, 0.129009247f, 0.209098816f, 0.285770416f, 0.357688904f, 0.425796509f, 0.492305756f, 0.554431915f,
        0.615291595f, 0.672328949f, 0.727500916f, 0.781616211f, 0.833011627f, 0.881893158f, 0.931503296f, 0.976585388f);
}
inline F32 quick_log2_below(F32 x, F32 a, F32 b) {
    const __m512i place = _mm512_srli_epi32(_mm512_castps_si512(x), 19);            // its last four binary digits count
    const F32 e = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const F32 whole = _mm512_add_ps(e, _mm512_permutexvar_ps(place, logs())), rest = _mm512_fmsub_ps(a, b, whole);
    const F32 r = fma(m, _mm512_permutexvar_ps(place, log_inverses()), _mm512_set1_ps(-1.0f));
    F32 p = fma(_mm512_set1_ps(0.360674676f), r, _mm512_set1_ps(-0.481228992f));
    p = fma(p, r, _mm512_set1_ps(0.721347606f));
    p = fma(p, r, _mm512_set1_ps(-1.44269497f));
    return fma(p, r, rest);
}
// The same for x + error, with y in the place of a b: absolute error 1e-8 where the result is small
inline F32 quick_log2_below(F32 x, F32 error, F32 y, bool) {
    const __m512i place = _mm512_srli_epi32(_mm512_castps_si512(x), 19);
    const F32 e = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const F32 inverse = _mm512_permutexvar_ps(place, log_inverses()), rest = _mm512_sub_ps(y, _mm512_add_ps(e, _mm512_permutexvar_ps(place, logs())));
    const F32 more = _mm512_scalef_ps(error, _mm512_sub_ps(_mm512_setzero_ps(), e));
    const F32 r = fma(more, inverse, fma(m, inverse, _mm512_set1_ps(-1.0f)));
    F32 p = fma(_mm512_set1_ps(0.360674676f), r, _mm512_set1_ps(-0.481228992f));
    p = fma(p, r, _mm512_set1_ps(0.721347606f));
    p = fma(p, r, _mm512_set1_ps(-1.44269497f));
    return fma(p, r, rest);
}
// 1 / x with a relative error of 2^-23
template <class V> constexpr bool has_quick_inverse = sizeof(V) / sizeof(V{}[0]) == 16;
inline F32 quick_inverse(F32 x) {
    const F32 y = _mm512_rcp14_ps(x);
    return fma(y, _mm512_fnmadd_ps(y, x, _mm512_set1_ps(1.0f)), y);
}

inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F64 load(const double* p) { return _mm512_loadu_pd(p); }
inline F32 widen(__m256i x, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline F32 widen(__m256i x, f16) { return _mm512_cvtph_ps(x); }
inline F32 load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), bf16()); }
inline F32 load(const f16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), f16()); }

// To the nearest, ties to even; NaN stays NaN.
inline __m256i narrow(F32 v, bf16) {
    __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
inline __m256i narrow(F32 v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
inline void store(double* p, F64 v) { _mm512_storeu_pd(p, v); }
template <class E>
inline void store(E* p, F32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, E())); }

inline F32 load_part(const float* p, int n, F32 fill) { return _mm512_mask_loadu_ps(fill, (1u << n) - 1, p); }
inline F64 load_part(const double* p, int n, F64 fill) { return _mm512_mask_loadu_pd(fill, (1u << n) - 1, p); }
template <class E>
inline F32 load_part(const E* p, int n, F32 fill) {
    __mmask16 mask = (1u << n) - 1;
    return _mm512_mask_blend_ps(mask, fill, widen(_mm256_maskz_loadu_epi16(mask, p), E()));
}
inline void store_part(float* p, int n, F32 v) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
inline void store_part(double* p, int n, F64 v) { _mm512_mask_storeu_pd(p, (1u << n) - 1, v); }
template <class E>
inline void store_part(E* p, int n, F32 v) { _mm256_mask_storeu_epi16(p, (1u << n) - 1, narrow(v, E())); }

inline void stream(float* p, F32 v) { _mm512_stream_ps(p, v); }
inline void stream(double* p, F64 v) { _mm512_stream_pd(p, v); }
template <class E>
inline void stream(E* p, F32 v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, E())); }

template <class E> constexpr bool has_transpose = sizeof(E) < 8;
inline void transpose(F32 (&r)[16]) {
    F32 t[16];
    for (int i = 0; i < 16; i += 2) {                       // pairs of rows, element by element
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)                         // four rows in each quarter of a vector
        for (int j = 0; j < 2; ++j) {
            __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 16; i += 8)                         // eight rows
        for (int j = 0; j < 4; ++j) {
            t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {                           // sixteen
        r[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
}

// Two vectors at once are cheaper for bfloat16: one load or store, and half the rearranging. Every NaN must come with
// zeros in its lower half, which all do that stem from bfloat16 or from NAN.
inline void load_pair(const bf16* p, F32& x, F32& y) {
    const __m512i first = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,
                                           7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    __m512i both = _mm512_loadu_si512(p), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    x = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, first, both));
    y = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, second, both));
}
inline __m512i rounded_to_bf16(F32 v) {                     // in the upper halves
    __m512i u = _mm512_castps_si512(v), up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
}
inline void give_pair(bf16* p, F32 x, F32 y, bool past_cache, bool rounds_bf16) {
    const __m512i upper = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,
                                           31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    __m512i both;
    // By name, because not every CPU of this instruction set has it
    if (rounds_bf16) asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(y), "v"(x));
    else both = _mm512_permutex2var_epi16(rounded_to_bf16(x), upper, rounded_to_bf16(y));
    if (past_cache) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both);
    else _mm512_storeu_si512(p, both);
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + prefetch_ahead, _MM_HINT_T0); }
inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void stream_end() { _mm_sfence(); }

}  // namespace KDLAB_ISA
