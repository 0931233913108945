// Denormal numbers count as zero while one of these lives; the thread's own setting comes back afterwards.
#pragma once
#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace kdlab {

#if defined(__SSE2__) || defined(_M_X64)
class FlushDenormals {
    unsigned saved = _mm_getcsr();
public:
    FlushDenormals() { _mm_setcsr(saved | 0x8040); }         // flush to zero, denormals are zero
    ~FlushDenormals() { _mm_setcsr(saved); }
};
#elif defined(__aarch64__) && defined(__GNUC__)
class FlushDenormals {
    unsigned long saved;
public:
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved));
        asm volatile("msr fpcr, %0" : : "r"(saved | 1ul << 24));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved)); }
};
#else
struct FlushDenormals {
    FlushDenormals() {}
};
#endif

}  // namespace kdlab
