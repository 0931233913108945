// What the fuzz programs share: random numbers, numbers as the kernels read them, and the loop over cases.
#pragma once
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kdlab.h"

namespace {

typedef std::mt19937_64 Random;
typedef std::vector<double> Numbers;

inline int64_t pick(Random& r, int64_t below) { return static_cast<int64_t>(r() % static_cast<uint64_t>(below)); }
inline bool chance(Random& r, double p) { return std::uniform_real_distribution<>(0, 1)(r) < p; }

// Numbers as the kernel reads them, in exactly as many bytes as they need.
struct Array {
    int dtype;
    int64_t count;
    std::unique_ptr<char[]> bytes;
    Array(int d, int64_t n) : dtype(d), count(n), bytes(new char[n * size()]()) {}
    int64_t size() const { return dtype == KDLAB_F64 ? 8 : dtype == KDLAB_F32 ? 4 : 2; }
    void* data() const { return bytes.get(); }
    bool equals(const Array& other) const { return !std::memcmp(data(), other.data(), count * size()); }

    void set(int64_t i, double x) {                    // half precision truncates: any value will do, so long as both sides read it
        const float f = static_cast<float>(x);
        uint32_t b;
        std::memcpy(&b, &f, 4);
        const uint16_t h = dtype == KDLAB_BF16 ? static_cast<uint16_t>(b >> 16) : half(f);
        if (dtype == KDLAB_F64) std::memcpy(&bytes[i * 8], &x, 8);
        else if (dtype == KDLAB_F32) std::memcpy(&bytes[i * 4], &f, 4);
        else std::memcpy(&bytes[i * 2], &h, 2);
    }
    double get(int64_t i) const {
        double d;
        float f;
        uint16_t h;
        if (dtype == KDLAB_F64) return std::memcpy(&d, &bytes[i * 8], 8), d;
        if (dtype == KDLAB_F32) return std::memcpy(&f, &bytes[i * 4], 4), f;
        std::memcpy(&h, &bytes[i * 2], 2);
        if (dtype == KDLAB_F16) return unhalf(h);
        const uint32_t b = static_cast<uint32_t>(h) << 16;
        return std::memcpy(&f, &b, 4), f;
    }
    Numbers part(int64_t from, int64_t n) const {
        Numbers x(n);
        for (int64_t i = 0; i < n; ++i) x[i] = get(from + i);
        return x;
    }

    static uint16_t half(float f) {
        if (f != f) return 0x7e00;
        const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
        int e;
        const float m = std::frexp(std::fabs(f), &e);  // f = m 2^e, m in [0.5, 1)
        if (std::isinf(f) || e > 16) return sign | 0x7c00;
        if (e < -13) return sign;
        return static_cast<uint16_t>(sign | ((e + 14) << 10) | static_cast<int>((2 * m - 1) * 1024));
    }
    static double unhalf(uint16_t h) {
        const int e = (h >> 10) & 31, m = h & 1023;
        const double x = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
        return h & 0x8000 ? -x : x;
    }
};

inline bool same(double got, double want, double tolerance) {
    if (std::isnan(want)) return std::isnan(got);
    if (std::isinf(want)) return got == want;
    return std::fabs(got - want) <= tolerance;
}

// PROGRAM [seconds] [seed]: cases of once(random, isa) with every instruction set in turn, until the time is over. The
// number of a case and the seed decide what it draws.
template <class Once>
int fuzz(int argc, char** argv, Once once) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 10;
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
    const auto start = std::chrono::steady_clock::now();
    int64_t cases = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds)
        for (int i = 0; const char* isa = kdlab_isa_at(i); ++i, ++cases) {
            kdlab_set_isa(isa);
            Random r(seed * 1000003 + static_cast<uint64_t>(cases));
            once(r, isa);
        }
    std::printf("%lld cases, no failure\n", static_cast<long long>(cases));
    return 0;
}

}  // namespace
