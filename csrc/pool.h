// Large buffers that are used again. The first touch of fresh memory costs more than computing a gradient into it
// (0.5 ms a MiB in pages of 4 kB), so a gradient's memory comes back here when the last tensor over it dies.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kdlab {

constexpr size_t pooled_from = size_t(1) << 18;   // bytes; malloc returns no less than 128 KiB to the system

struct Buffer {
    void* data;
    size_t capacity;            // bytes, a multiple of 64 KiB
};

// All of these may be called from any thread, with or without Python, also in a forked child.
Buffer pool_take(size_t bytes);                   // aligned to 2 MiB if as large; data is null when memory is out
void pool_give(Buffer buffer);
void pool_clear();                                // free what nobody uses

struct PoolInfo {
    size_t limit, idle, idle_buffers, reused, fresh;   // bytes, bytes, and counts since the start
};
PoolInfo pool_info();

// Memory of any size for a tensor's data, aligned to 64 bytes.
void* aligned_allocate(size_t bytes);
void aligned_release(void* p);

}  // namespace kdlab
