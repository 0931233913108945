// The threads that work on one row: some lanes of a warp, a block, or the blocks of a cluster. What they add up they
// add in one fixed order, and every thread gets the same number.
#pragma once
#include "device.h"

namespace kdlab {

constexpr int warp_lanes = 32, most_warps = 16, most_sums = 8, most_stages = 5;

struct Add { template <class X> KDLAB_DEVICE X operator()(X x, X y) const { return x + y; } };
struct Larger { template <class X> KDLAB_DEVICE X operator()(X x, X y) const { return x > y ? x : y; } };

class Team {
    int lane, warp, warps;
    unsigned mask;                      // lanes of this warp that belong to the team
    double* slots;                      // [most_stages][most_warps + 1][most_sums], if the team is larger than a warp

    template <class X>
    KDLAB_DEVICE X* slot(int stage, int i) const {
        return reinterpret_cast<X*>(slots + (stage * (most_warps + 1) + i) * most_sums);
    }

public:
    int rank, size;                     // among the team's threads in this block
    int slice, slices;                  // this block among those of the team

    // `lanes` threads a team, a power of two, if less than a block; `blocks` blocks a team, if more than one
    KDLAB_DEVICE Team(int lanes, int blocks, unsigned char* memory)
        : lane(int(threadIdx.x) % warp_lanes), slots(reinterpret_cast<double*>(memory)), rank(int(threadIdx.x) % lanes),
          size(lanes), slice(int(blockIdx.x % unsigned(blocks))), slices(blocks) {
        warp = rank / warp_lanes;
        warps = (size + warp_lanes - 1) / warp_lanes;
        mask = size < warp_lanes ? ((1u << size) - 1) << (lane / size * size) : 0xffffffffu;
    }

    KDLAB_DEVICE bool first() const { return rank == 0 && slice == 0; }

    static KDLAB_BOTH constexpr int bytes() { return int(sizeof(double)) * most_stages * (most_warps + 1) * most_sums; }

    // x[i] of all threads, combined; and what a thread wrote before, all threads of its block may read after. A call
    // has another stage than the one before it: so nothing is overwritten that another thread still reads.
    template <int N, class X, class Op>
    KDLAB_DEVICE void combine(X (&x)[N], Op op, int stage) const {
        static_assert(N <= most_sums, "too many at once");
        KDLAB_AS_IT_IS
        for (int offset = (size < warp_lanes ? size : warp_lanes) / 2; offset; offset /= 2)
            KDLAB_UNROLL
            for (int i = 0; i < N; ++i) x[i] = op(x[i], shuffle_xor(mask, x[i], offset));
        if (warps == 1) {
            warp_sync(mask);                            // shuffles alone do not order memory
        } else {
            if (lane == 0)
                KDLAB_UNROLL
                for (int i = 0; i < N; ++i) slot<X>(stage, warp)[i] = x[i];
            block_sync();
            KDLAB_UNROLL
            for (int i = 0; i < N; ++i) x[i] = slot<X>(stage, 0)[i];
            KDLAB_AS_IT_IS
            for (int w = 1; w < warps; ++w)
                KDLAB_UNROLL
                for (int i = 0; i < N; ++i) x[i] = op(x[i], slot<X>(stage, w)[i]);
        }
        if (slices > 1) {
            X* own = slot<X>(stage, most_warps);
            if (rank == 0)
                KDLAB_UNROLL
                for (int i = 0; i < N; ++i) own[i] = x[i];
            cluster_sync();
            const X* theirs = in_block(own, lane % slices);
            KDLAB_UNROLL
            for (int i = 0; i < N; ++i) x[i] = theirs[i];
            KDLAB_AS_IT_IS
            for (int offset = slices / 2; offset; offset /= 2)
                KDLAB_UNROLL
                for (int i = 0; i < N; ++i) x[i] = op(x[i], shuffle_xor(mask, x[i], offset));
        }
    }

    // No block may end while another reads its memory.
    KDLAB_DEVICE void leave() const { if (slices > 1) cluster_sync(); }
};

}  // namespace kdlab
