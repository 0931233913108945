// The CUDA of csrc/cuda/device.h on the host, for tests: every thread of a block (of a cluster) is a fibre on one
// processor thread, and barriers and shuffles wait for those they must wait for. So the very source of the kernels runs
// here, with its indices, phases and reductions; a thread that does not come to a barrier is reported. The order in
// which fibres run is a parameter: results that depend on it show a missing barrier. ex2, log and division err as much
// as those of the device may.
#pragma once
#include <ucontext.h>

#include <algorithm>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/half.h"

#define KDLAB_BOTH inline
#define KDLAB_DEVICE inline
#define KDLAB_KERNEL(most_threads) inline void
#define KDLAB_UNROLL
#define KDLAB_AS_IT_IS

namespace emulator {

struct Index { unsigned x; };

struct Barrier { int expected = 0, arrived = 0; long generation = 0; };

struct Warp {
    unsigned char values[32][8];
    std::map<unsigned, Barrier> barriers;               // by mask
};

struct Block {
    std::vector<unsigned char> shared;
    std::vector<Warp> warps;
    Barrier barrier;
    int running = 0;                                    // threads that have not returned
};

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index thread, block;
    Block* home;
    const Barrier* waits = nullptr;                     // until its generation is no longer the one below
    long generation = 0;
    bool done = false;
};

struct State {
    Index block_dim, grid_dim;
    std::vector<Fibre> fibres;
    std::vector<Block> blocks;
    Barrier cluster;
    Fibre* self = nullptr;
    ucontext_t scheduler;
    std::function<void()> kernel;
};
inline State state;
inline unsigned order = 0;                              // 0: as numbered; 1: backwards; others: shuffled by this seed
inline long launches = 0;

inline void wait(Barrier& b, int expected) {
    b.expected = expected;
    if (++b.arrived == b.expected) {
        b.arrived = 0;
        ++b.generation;
        return;
    }
    Fibre* self = state.self;
    self->waits = &b;
    self->generation = b.generation;
    swapcontext(&self->context, &state.scheduler);
}

inline void enter() {
    state.kernel();
    state.self->done = true;
    swapcontext(&state.self->context, &state.scheduler);
}

// The blocks from `first` on that form one cluster, all threads together
inline void run_cluster(unsigned first, int cluster, int threads, int shared_bytes) {
    constexpr size_t stack_bytes = 32 << 10;
    State& s = state;
    s.blocks.clear();
    s.blocks.resize(size_t(cluster));
    s.cluster = Barrier();
    if (s.fibres.size() < size_t(cluster * threads)) s.fibres.resize(size_t(cluster * threads));
    std::vector<std::vector<Fibre*>> turn;              // warp by warp: each runs as far as it can
    for (int b = 0; b < cluster; ++b) {
        Block& block = s.blocks[size_t(b)];
        block.shared.assign(size_t(shared_bytes), 0xcd);
        block.warps.resize(size_t(threads + 31) / 32);
        block.running = threads;
        for (int i = 0; i < threads; ++i) {
            Fibre& f = s.fibres[size_t(b * threads + i)];
            if (!f.stack) f.stack.reset(new char[stack_bytes]);
            f.thread = {unsigned(i)};
            f.block = {first + unsigned(b)};
            f.home = &block;
            f.waits = nullptr;
            f.done = false;
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get();
            f.context.uc_stack.ss_size = stack_bytes;
            makecontext(&f.context, enter, 0);
            if (i % 32 == 0) turn.emplace_back();
            turn.back().push_back(&f);
        }
    }
    std::mt19937 random(order);
    if (order == 1) std::reverse(turn.begin(), turn.end());
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    for (auto& warp : turn)
        if (order) std::shuffle(warp.begin(), warp.end(), random);
    auto run = [&](Fibre* f) {                          // did it move?
        if (f->done || (f->waits && f->waits->generation == f->generation)) return false;
        f->waits = nullptr;
        s.self = f;
        swapcontext(&s.scheduler, &f->context);
        std::vector<unsigned char>& shared = f->home->shared;
        if (f->done && --f->home->running == 0) std::fill(shared.begin(), shared.end(), 0xee);     // it is gone
        return true;
    };
    bool moved = true;
    while (moved) {
        moved = false;
        for (auto& warp : turn)
            for (bool again = true; again; moved |= again) {
                again = false;
                for (Fibre* f : warp) again |= run(f);
            }
    }
    for (auto& warp : turn)
        for (Fibre* f : warp)
            if (!f->done) {
                std::printf("FAILED: thread %u of block %u waits for ever\n", f->thread.x, f->block.x);
                std::abort();
            }
}

inline float off_by(float y, float relative) {          // an error of up to `relative`, the same for the same y
    uint32_t u;
    std::memcpy(&u, &y, 4);
    u = (u ^ (u >> 15)) * 0x2c1b3c6du;
    u = (u ^ (u >> 12)) * 0x297a2d39u;
    return y * (1 + relative * (float(u >> 8) / 8388608.0f - 1));
}

}  // namespace emulator

#define threadIdx (emulator::state.self->thread)
#define blockIdx (emulator::state.self->block)
#define blockDim (emulator::state.block_dim)
#define gridDim (emulator::state.grid_dim)

namespace kdlab {

using std::exp, std::expm1, std::log, std::log1p, std::sqrt;

inline float exp2_of(float x) {
    const float y = std::exp2(x);
    return y < FLT_MIN ? 0 : x == 0 || !(y < INFINITY) ? y : emulator::off_by(y, 0x1p-22f);
}
inline double exp2_of(double x) { return std::exp2(x); }
inline float ratio(float x, float y) {
    const float z = x / y;
    return z != z || std::isinf(z) ? z : emulator::off_by(z, 0x1p-23f);
}
inline double ratio(double x, double y) { return x / y; }
inline float fused(float x, float y, float z) { return std::fma(x, y, z); }
inline double fused(double x, double y, double z) { return std::fma(x, y, z); }

template <class E> struct alignas(16) Pack { E x[16 / sizeof(E)]; };
template <class E> auto element(const Pack<E>& p, int i) { return to_real(p.x[i]); }
template <class R, int N, class E> void assemble(const R (&x)[N], Pack<E>* p) {
    for (int i = 0; i < N; ++i) from_real(x[i], &p->x[i]);
}
template <class E> auto top_of(const Pack<E>& p) {
    auto top = element(p, 0);
    for (int i = 1; i < int(16 / sizeof(E)); ++i) top = std::fmax(element(p, i), top);
    return top;
}
inline void check_alignment(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return;
    std::printf("FAILED: 16 bytes at an address that is no multiple of 16\n");
    std::abort();
}
template <class E> Pack<E>* pack_at(E* p) { return check_alignment(p), reinterpret_cast<Pack<E>*>(p); }
template <class E>
const Pack<E>* pack_at(const E* p) { return check_alignment(p), reinterpret_cast<const Pack<E>*>(p); }
template <class E> Pack<E> load_once(const Pack<E>* p) { return *p; }
template <class E> void keep(Pack<E>* p, const Pack<E>& x) { *p = x; }
template <class E> void store_once(Pack<E>* p, const Pack<E>& x) { *p = x; }

inline unsigned char* shared_memory() { return emulator::state.self->home->shared.data(); }
inline void block_sync() { emulator::wait(emulator::state.self->home->barrier, int(emulator::state.block_dim.x)); }

template <class X>
X shuffle_xor(unsigned mask, X x, int offset) {
    const int lane = int(threadIdx.x % 32);
    emulator::Warp& warp = emulator::state.self->home->warps[threadIdx.x / 32];
    if (!(mask >> lane & 1) || !(mask >> (lane ^ offset) & 1)) {
        std::printf("FAILED: a shuffle with a lane outside its mask\n");
        std::abort();
    }
    std::memcpy(warp.values[lane], &x, sizeof x);
    emulator::wait(warp.barriers[mask], __builtin_popcount(mask));
    std::memcpy(&x, warp.values[lane ^ offset], sizeof x);
    emulator::wait(warp.barriers[mask], __builtin_popcount(mask));
    return x;
}

inline void warp_sync(unsigned mask) {
    emulator::wait(emulator::state.self->home->warps[threadIdx.x / 32].barriers[mask], __builtin_popcount(mask));
}
inline void cluster_sync() {
    emulator::wait(emulator::state.cluster, int(emulator::state.blocks.size() * emulator::state.block_dim.x));
}
template <class X>
X* in_block(X* p, int rank) {
    const ptrdiff_t offset = reinterpret_cast<unsigned char*>(p) - shared_memory();
    return reinterpret_cast<X*>(emulator::state.blocks[size_t(rank)].shared.data() + offset);
}

// ---- on the host -------------------------------------------------------------------------------------------------
struct DeviceInfo { int shared_bytes, cluster; };
inline DeviceInfo device_info(int) { return {227 << 10, 16}; }

constexpr int most_devices = 64;
struct OnDevice {
    int error = 0;
    explicit OnDevice(int) {}
};
inline const char* message(int) { return nullptr; }

template <class Job>
const char* launch(void (*kernel)(Job), int64_t blocks, int threads, int shared_bytes, int cluster, void*,
                   const Job& job) {
    ++emulator::launches;
    emulator::state.kernel = [&] { kernel(job); };
    emulator::state.block_dim = {unsigned(threads)};
    emulator::state.grid_dim = {unsigned(blocks)};
    for (int64_t b = 0; b < blocks; b += cluster) emulator::run_cluster(unsigned(b), cluster, threads, shared_bytes);
    return nullptr;
}
template <class Job> bool cluster_fits(void (*)(Job), int, int, int, int) { return true; }
inline const char* fill_zero(void* p, size_t bytes, void*) {
    if (p) std::memset(p, 0, bytes);
    return nullptr;
}

}  // namespace kdlab
