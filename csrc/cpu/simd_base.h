// Vectors of the base kernels: four floats or two doubles where the compiler has GNU vectors (SSE2, NEON), else one.
// Every simd_*.h defines the same names; the kernels are written with these and with + - * / and < only.
namespace KDLAB_ISA {

#if defined(__GNUC__)
typedef float F32 __attribute__((vector_size(16)));
typedef double F64 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
typedef int64_t I64 __attribute__((vector_size(16)));
inline F32 to_float(I32 x) { return __builtin_convertvector(x, F32); }
inline F64 to_float(I64 x) { return __builtin_convertvector(x, F64); }
inline F64 low_half(F32 x) { return F64{x[0], x[1]}; }
inline F64 high_half(F32 x) { return F64{x[2], x[3]}; }
inline double sum_of(F64 x) { return x[0] + x[1]; }
#else
typedef float F32;
typedef double F64;
typedef int32_t I32;
typedef int64_t I64;
inline F32 to_float(I32 x) { return static_cast<float>(x); }
inline F64 to_float(I64 x) { return static_cast<double>(x); }
inline F64 low_half(F32 x) { return x; }
inline F64 high_half(F32) { return 0; }
inline double sum_of(F64 x) { return x; }
#endif

inline F32 splat(F32, float x) { return x - F32{}; }
inline F64 splat(F64, double x) { return x - F64{}; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F64 fma(F64 a, F64 b, F64 c) { return a * b + c; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }      // if either is NaN: b
inline F64 max(F64 a, F64 b) { return a > b ? a : b; }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
inline F64 min(F64 a, F64 b) { return a < b ? a : b; }
inline F32 abs(F32 a) { return max(a, -a); }
inline F64 abs(F64 a) { return max(a, -a); }
inline F64 at_most_1(F64 a) { return min(max(a, splat(a, -1)), splat(a, 1)); }     // its absolute value, that is

// The largest lane; anything if one is NaN.
inline float max_of(F32 v) {
    float x[sizeof v / 4];
    std::memcpy(x, &v, sizeof v);
    for (float y : x) x[0] = y > x[0] ? y : x[0];
    return x[0];
}
inline double max_of(F64 v) {
    double x[sizeof v / 8];
    std::memcpy(x, &v, sizeof v);
    for (double y : x) x[0] = y > x[0] ? y : x[0];
    return x[0];
}

// Is there quick_exp2(x, k, finer), which is 2^(x k) where x k is below 4?
template <class V> constexpr bool has_quick_exp2 = false;
// Are there quick_log2_below(x, a, b), which is a b - log2 x, and quick_inverse(x), for normal positive x?
template <class V> constexpr bool has_quick_log2 = false;
template <class V> constexpr bool has_quick_inverse = false;
// 2^n from n + exponent bias in the low bits of x (see exp2_of); 0 for n = -127 (float) or -1023 (double)
inline F32 power_of_2(F32 x) {
    I32 i;
    std::memcpy(&i, &x, sizeof i);
    i = i << 23;
    std::memcpy(&x, &i, sizeof i);
    return x;
}
inline F64 power_of_2(F64 x) {
    I64 i;
    std::memcpy(&i, &x, sizeof i);
    i = i << 52;
    std::memcpy(&x, &i, sizeof i);
    return x;
}

template <class V, class E>
inline V load_each(const E* p) {
    decltype(to_real(*p)) x[sizeof(V) / sizeof(to_real(*p))];
    for (size_t i = 0; i < sizeof(V) / sizeof *x; ++i) x[i] = to_real(p[i]);
    V v;
    std::memcpy(&v, x, sizeof v);
    return v;
}
inline F32 load(const float* p) { return load_each<F32>(p); }
inline F64 load(const double* p) { return load_each<F64>(p); }
inline F32 load(const bf16* p) { return load_each<F32>(p); }
inline F32 load(const f16* p) { return load_each<F32>(p); }

template <class E, class V>
inline void store_each(E* p, V v) {
    decltype(to_real(*p)) x[sizeof(V) / sizeof(to_real(*p))];
    std::memcpy(x, &v, sizeof v);
    for (size_t i = 0; i < sizeof(V) / sizeof *x; ++i) from_real(x[i], p + i);
}
inline void store(float* p, F32 v) { store_each(p, v); }
inline void store(double* p, F64 v) { store_each(p, v); }
inline void store(bf16* p, F32 v) { store_each(p, v); }
inline void store(f16* p, F32 v) { store_each(p, v); }

// The first n elements at p, fewer than there are lanes; the others are `fill`, and are not touched in store_part.
template <class E, class V>
inline V load_part(const E* p, int n, V fill) {
    decltype(to_real(*p)) x[sizeof(V) / sizeof(to_real(*p))];
    std::memcpy(x, &fill, sizeof x);
    for (int i = 0; i < n; ++i) x[i] = to_real(p[i]);
    std::memcpy(&fill, x, sizeof x);
    return fill;
}
template <class E, class V>
inline void store_part(E* p, int n, V v) {
    decltype(to_real(*p)) x[sizeof(V) / sizeof(to_real(*p))];
    std::memcpy(x, &v, sizeof x);
    for (int i = 0; i < n; ++i) from_real(x[i], p + i);
}

// Is there transpose(), which makes columns of as many rows as there are lanes, and is it quick for elements of type E?
template <class E> constexpr bool has_transpose = false;

template <class E, class V>
inline void stream(E* p, V v) { store(p, v); }              // past the cache where the CPU can
#if defined(__GNUC__)
inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + prefetch_ahead); }
inline void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }       // into the second cache
#else
inline void prefetch(const void*) {}
inline void fetch(const void*) {}
#endif
inline void stream_end() {}

}  // namespace KDLAB_ISA
