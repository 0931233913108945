// bfloat16 and float16 to and from float, one number at a time, in integer arithmetic: flushed denormals do not matter.
#pragma once
#include <cstdint>
#include <cstring>

#include "rows.h"

namespace kdlab {

inline uint32_t bits_of(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
inline float from_bits(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

inline float to_real(float x) { return x; }
inline double to_real(double x) { return x; }
inline float to_real(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline float to_real(f16 h) {
    uint32_t sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31, mantissa = h.bits & 1023;
    if (exponent == 0) return from_bits(sign | bits_of(static_cast<float>(mantissa) * 0x1p-24f));
    if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
    return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Rounds to the nearest, ties to even.
inline void from_real(float x, float* y) { *y = x; }
inline void from_real(double x, double* y) { *y = x; }

inline void from_real(float x, bf16* y) {
    uint32_t u = bits_of(x);
    bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    y->bits = static_cast<uint16_t>(nan ? (u >> 16) | 64 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline void from_real(float x, f16* y) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu, h;
    if (magnitude > 0x7f800000u) h = 0x7e00;
    else if (magnitude >= 0x477ff000u) h = 0x7c00;                       // 65520 and more round to infinity
    else if (magnitude >= 0x38800000u) h = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    else h = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);       // subnormal: the sum rounds to steps of 2^-24
    y->bits = static_cast<uint16_t>(sign | h);
}

}  // namespace kdlab
