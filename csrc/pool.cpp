#include "pool.h"

#include <cstdlib>
#include <deque>
#include <mutex>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace kdlab {
namespace {

constexpr size_t page = size_t(2) << 20;          // a huge page
constexpr size_t grain = size_t(64) << 10;        // of the sizes of buffers
// Large tensors begin at the same place of a small page, where malloc puts them. A gradient that did so too would make the CPU take
// the logits it reads for those it has just written, a tenth of the time of short rows.
constexpr size_t aside = 2048, small_page = 4096;

#if defined(_WIN32)
void* map_whole(size_t bytes) { return _aligned_malloc(bytes, page); }
void unmap_whole(void* p, size_t) { _aligned_free(p); }
#else
// Straight from the system: malloc would keep what is freed, and learn a larger threshold from it.
void* map_whole(size_t bytes) {
    const size_t more = bytes < page ? 0 : page;      // for the alignment that huge pages want
    char* whole = static_cast<char*>(mmap(nullptr, bytes + more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0));
    if (whole == MAP_FAILED) return nullptr;
    if (!more) return whole;
    size_t before = (page - reinterpret_cast<uintptr_t>(whole) % page) % page;
    if (before) munmap(whole, before);
    munmap(whole + before + bytes, page - before);
#ifdef MADV_HUGEPAGE
    madvise(whole + before, bytes, MADV_HUGEPAGE);
#endif
    return whole + before;
}
void unmap_whole(void* p, size_t bytes) { munmap(p, bytes); }
#endif

void* map(size_t bytes) {
    void* whole = map_whole(bytes + small_page);
    return whole ? static_cast<char*>(whole) + aside : nullptr;
}
void unmap(void* p, size_t bytes) { unmap_whole(static_cast<char*>(p) - aside, bytes + small_page); }

size_t limit_from_environment() {
    const char* text = std::getenv("KDLAB_POOL_MB");
    char* end = nullptr;
    long long mb = text ? std::strtoll(text, &end, 10) : 0;
    bool number = text && end != text && *end == 0 && mb >= 0;
    return static_cast<size_t>(number ? mb : 512) << 20;
}

struct Pool {
    std::mutex mutex;
    std::deque<Buffer> idle;                      // the oldest first
    PoolInfo info = {limit_from_environment(), 0, 0, 0, 0};

    // The smallest that fits and is not more than a quarter too large. Caller holds the mutex.
    Buffer find(size_t bytes) {
        auto best = idle.end();
        for (auto b = idle.begin(); b != idle.end(); ++b)
            if (b->capacity >= bytes && b->capacity <= bytes + bytes / 4 &&
                (best == idle.end() || b->capacity <= best->capacity)) best = b;
        if (best == idle.end()) return {nullptr, bytes};
        Buffer found = *best;
        idle.erase(best);
        info.idle -= found.capacity;
        return found;
    }

    void drop_oldest() {
        unmap(idle.front().data, idle.front().capacity);
        info.idle -= idle.front().capacity;
        idle.pop_front();
    }
};

// Never destroyed: tensors may outlive the interpreter's last breath.
Pool& pool() {
    static Pool* the = [] {
#if !defined(_WIN32)
        // A child must not inherit a mutex that another thread held at the fork.
        pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
#endif
        return new Pool;
    }();
    return *the;
}

}  // namespace

Buffer pool_take(size_t bytes) {
    bytes = (bytes + grain - 1) / grain * grain;
    Buffer buffer;
    {
        Pool& p = pool();
        std::lock_guard<std::mutex> lock(p.mutex);
        buffer = p.find(bytes);
        ++(buffer.data ? p.info.reused : p.info.fresh);
    }
    if (!buffer.data) buffer.data = map(bytes);
    if (!buffer.data) {
        pool_clear();
        buffer.data = map(bytes);
    }
    return buffer;
}

void pool_give(Buffer buffer) {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    if (buffer.capacity > p.info.limit) return unmap(buffer.data, buffer.capacity);
    while (p.info.idle + buffer.capacity > p.info.limit) p.drop_oldest();
    p.idle.push_back(buffer);
    p.info.idle += buffer.capacity;
}

void pool_clear() {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    while (!p.idle.empty()) p.drop_oldest();
}

PoolInfo pool_info() {
    Pool& p = pool();
    std::lock_guard<std::mutex> lock(p.mutex);
    PoolInfo info = p.info;
    info.idle_buffers = p.idle.size();
    return info;
}

void* aligned_allocate(size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, 64);
#else
    void* p = nullptr;
    return posix_memalign(&p, 64, bytes) == 0 ? p : nullptr;
#endif
}

void aligned_release(void* p) {
#if defined(_WIN32)
    _aligned_free(p);
#else
    free(p);
#endif
}

}  // namespace kdlab
