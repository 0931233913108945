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
#else
typedef float F32;
typedef double F64;
typedef int32_t I32;
typedef int64_t I64;
inline F32 to_float(I32 x) { return static_cast<float>(x); }
inline F64 to_float(I64 x) { return static_cast<double>(x); }
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

// p * 2^n for a whole n >= -127 (float) or -1023 (double), where the result is 0
inline F32 scale2(F32 p, F32 n) {
    n = n + 12582912.0f + 127.0f;                           // 1.5 * 2^23: the number stands in the low bits
    I32 i;
    std::memcpy(&i, &n, sizeof i);
    i = i << 23;
    std::memcpy(&n, &i, sizeof i);
    return p * n;
}
inline F64 scale2(F64 p, F64 n) {
    n = n + 6755399441055744.0 + 1023.0;
    I64 i;
    std::memcpy(&i, &n, sizeof i);
    i = i << 52;
    std::memcpy(&n, &i, sizeof i);
    return p * n;
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
template <class E, class V>
inline void stream(E* p, V v) { store(p, v); }              // past the cache where the CPU can
inline void stream_end() {}

}  // namespace KDLAB_ISA
