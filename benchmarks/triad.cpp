// The bandwidth that a streaming loss is up against: two arrays read, one written, as much arithmetic as costs nothing.
// Compiled and called by the benchmarks; not a part of the package.
#include <cstdint>
#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

template <class F>
void share(int64_t n, int threads, F work) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t i = 0; i < threads; ++i) work(n / 64 * i / threads * 64, n / 64 * (i + 1) / threads * 64);
}

}  // namespace

// out = a + 0.5 b over n floats, a multiple of 64; out is aligned to 64 bytes.
extern "C" void plain_triad(float* out, const float* a, const float* b, int64_t n, int threads) {
    share(n, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) out[i] = a[i] + 0.5f * b[i];
    });
}

// The same with stores that go past the cache; 0 where this compiler has none for us.
extern "C" int streaming_triad(float* out, const float* a, const float* b, int64_t n, int threads) {
#if defined(__AVX512F__)
    share(n, threads, [=](int64_t begin, int64_t end) {
        const __m512 half = _mm512_set1_ps(0.5f);
        for (int64_t i = begin; i < end; i += 16) {
            __builtin_prefetch(a + i + 1024);
            __builtin_prefetch(b + i + 1024);
            _mm512_stream_ps(out + i, _mm512_fmadd_ps(half, _mm512_loadu_ps(b + i), _mm512_loadu_ps(a + i)));
        }
        _mm_sfence();
    });
    return 1;
#elif defined(__AVX__)
    share(n, threads, [=](int64_t begin, int64_t end) {
        const __m256 half = _mm256_set1_ps(0.5f);
        for (int64_t i = begin; i < end; i += 8) {
            __builtin_prefetch(a + i + 1024);
            __builtin_prefetch(b + i + 1024);
            _mm256_stream_ps(out + i, _mm256_add_ps(_mm256_mul_ps(half, _mm256_loadu_ps(b + i)), _mm256_loadu_ps(a + i)));
        }
        _mm_sfence();
    });
    return 1;
#else
    return 0;
#endif
}
