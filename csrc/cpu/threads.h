// Shares rows out to threads, and gives each thread its scratch memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

namespace kdlab {

// Scratch of a thread: grows, never shrinks, goes with the thread.
inline void* scratch_of(size_t bytes) {
    static thread_local std::unique_ptr<char[]> memory;
    static thread_local size_t size = 0;
    if (size < bytes + 64) {
        memory.reset();
        memory.reset(new char[bytes + 64]);
        size = bytes + 64;
    }
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

// Work smaller than this is done before a second thread has woken up.
constexpr int64_t elements_worth_a_thread = 32768;

template <class F>
void share_rows(int64_t rows, int64_t cols, int threads, F work) {
    int64_t n = std::min<int64_t>({threads, rows, rows * cols / elements_worth_a_thread});
    if (n <= 1) return work(int64_t(0), rows);
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(n))
#endif
    for (int64_t i = 0; i < n; ++i) work(rows * i / n, rows * (i + 1) / n);
}

}  // namespace kdlab
