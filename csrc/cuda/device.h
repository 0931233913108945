// The little that the kernels use of CUDA, under names that the emulator of the tests can give them as well: it
// compiles the same .cu files for the host (KDLAB_EMULATE) and runs every thread of a block as a fibre.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef KDLAB_EMULATE
#include "cuda_emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "../kdlab.h"

#define KDLAB_BOTH __host__ __device__ __forceinline__
#define KDLAB_DEVICE __device__ __forceinline__
#define KDLAB_KERNEL(most_threads) __global__ void __launch_bounds__(most_threads, 1)
#define KDLAB_UNROLL _Pragma("unroll")
#define KDLAB_AS_IT_IS _Pragma("unroll 1")       // a loop that the compiler shall leave alone: registers are scarce

namespace kdlab {

using std::exp, std::expm1, std::log, std::log1p, std::sqrt;

// 2^x: relative error at most 2^-22, results below 2^-126 are 0
KDLAB_BOTH float exp2_of(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return std::exp2(x);
#endif
}
KDLAB_BOTH double exp2_of(double x) { return exp2(x); }

// x / y, for ordinary y: two units in the last place
KDLAB_BOTH float ratio(float x, float y) {
#ifdef __CUDA_ARCH__
    return __fdividef(x, y);
#else
    return x / y;
#endif
}
KDLAB_BOTH double ratio(double x, double y) { return x / y; }

KDLAB_BOTH float fused(float x, float y, float z) { return fmaf(x, y, z); }
KDLAB_BOTH double fused(double x, double y, double z) { return fma(x, y, z); }

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

KDLAB_DEVICE float to_real(float x) { return x; }
KDLAB_DEVICE double to_real(double x) { return x; }
KDLAB_DEVICE float to_real(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
KDLAB_DEVICE float to_real(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
KDLAB_DEVICE void from_real(float x, float* y) { *y = x; }
KDLAB_DEVICE void from_real(double x, double* y) { *y = x; }
KDLAB_DEVICE void from_real(float x, bf16* y) { y->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
KDLAB_DEVICE void from_real(float x, f16* y) { y->bits = __half_as_ushort(__float2half_rn(x)); }

// Numbers of a loss dtype
KDLAB_DEVICE double at(const void* p, int dtype, int64_t i) {
    return dtype == KDLAB_F64 ? static_cast<const double*>(p)[i] : static_cast<const float*>(p)[i];
}
KDLAB_DEVICE void put(void* p, int dtype, int64_t i, double x) {
    if (!p) return;
    if (dtype == KDLAB_F64) static_cast<double*>(p)[i] = x;
    else static_cast<float*>(p)[i] = float(x);
}

// 16 bytes of elements, as whole registers: halves of one would take a register each
template <class E> struct alignas(16) Pack { uint32_t word[4]; };

KDLAB_DEVICE float element(const Pack<float>& p, int i) { return __uint_as_float(p.word[i]); }
KDLAB_DEVICE double element(const Pack<double>& p, int i) {
    return __hiloint2double(int(p.word[2 * i + 1]), int(p.word[2 * i]));
}
KDLAB_DEVICE float element(const Pack<bf16>& p, int i) {
    return __uint_as_float(i % 2 ? p.word[i / 2] & 0xffff0000u : p.word[i / 2] << 16);
}
KDLAB_DEVICE float element(const Pack<f16>& p, int i) {
    return __half2float(__ushort_as_half(uint16_t(p.word[i / 2] >> (i % 2 * 16))));
}

KDLAB_DEVICE uint32_t pair_of(bf16, float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
KDLAB_DEVICE uint32_t pair_of(f16, float x, float y) {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
KDLAB_DEVICE void assemble(const float (&x)[4], Pack<float>* p) {
    KDLAB_UNROLL
    for (int i = 0; i < 4; ++i) p->word[i] = __float_as_uint(x[i]);
}
KDLAB_DEVICE void assemble(const double (&x)[2], Pack<double>* p) {
    KDLAB_UNROLL
    for (int i = 0; i < 2; ++i) {
        p->word[2 * i] = uint32_t(__double2loint(x[i]));
        p->word[2 * i + 1] = uint32_t(__double2hiint(x[i]));
    }
}
template <class E>
KDLAB_DEVICE void assemble(const float (&x)[8], Pack<E>* p) {
    KDLAB_UNROLL
    for (int i = 0; i < 4; ++i) p->word[i] = pair_of(E(), x[2 * i], x[2 * i + 1]);
}

// The largest of a pack; NaN counts as nothing
KDLAB_DEVICE float top_of(const Pack<float>& p) {
    return fmaxf(fmaxf(element(p, 0), element(p, 1)), fmaxf(element(p, 2), element(p, 3)));
}
KDLAB_DEVICE double top_of(const Pack<double>& p) { return fmax(element(p, 0), element(p, 1)); }
KDLAB_DEVICE float top_of(const Pack<bf16>& p) {
    const __nv_bfloat162* x = reinterpret_cast<const __nv_bfloat162*>(p.word);
    const __nv_bfloat162 top = __hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3]));
    return fmaxf(__low2float(top), __high2float(top));
}
KDLAB_DEVICE float top_of(const Pack<f16>& p) {
    const __half2* x = reinterpret_cast<const __half2*>(p.word);
    const __half2 top = __hmax2(__hmax2(x[0], x[1]), __hmax2(x[2], x[3]));
    return fmaxf(__low2float(top), __high2float(top));
}

// The 16 bytes at an address that is a multiple of 16
template <class E> KDLAB_DEVICE Pack<E>* pack_at(E* p) { return reinterpret_cast<Pack<E>*>(p); }
template <class E> KDLAB_DEVICE const Pack<E>* pack_at(const E* p) { return reinterpret_cast<const Pack<E>*>(p); }

// Read or written once: first to leave the cache
template <class E> KDLAB_DEVICE Pack<E> load_once(const Pack<E>* p) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(p));
    return {{x.x, x.y, x.z, x.w}};
}
template <class E> KDLAB_DEVICE void store_once(Pack<E>* p, const Pack<E>& x) {
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}

// Into shared memory, in one piece: the compiler would make four stores of it, each of which hits a bank four times
template <class E> KDLAB_DEVICE void keep(Pack<E>* p, const Pack<E>& x) {
    const unsigned place = unsigned(__cvta_generic_to_shared(p));
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "r"(place), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3]) : "memory");
}

KDLAB_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}
KDLAB_DEVICE void block_sync() { __syncthreads(); }
KDLAB_DEVICE void warp_sync(unsigned mask) { __syncwarp(mask); }
template <class X>
KDLAB_DEVICE X shuffle_xor(unsigned mask, X x, int offset) { return __shfl_xor_sync(mask, x, offset); }

// Thread-block clusters: their blocks run at one time and read each other's shared memory.
KDLAB_DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
}
template <class X> KDLAB_DEVICE X* in_block(X* p, int rank) {       // what p is to the block of that rank
#if __CUDA_ARCH__ >= 900
    return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
    return p;
#endif
}

// ---- on the host -------------------------------------------------------------------------------------------------
struct DeviceInfo {
    int shared_bytes;           // that one block may have
    int cluster;                // blocks in the largest cluster; 1 where there are none
};

inline const char* message(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

constexpr int most_devices = 64;

inline DeviceInfo device_info(int device) {
    static DeviceInfo known[most_devices];
    static std::once_flag once[most_devices];
    std::call_once(once[device], [device] {
        int major = 0;
        cudaDeviceGetAttribute(&known[device].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        known[device].cluster = major >= 9 ? 16 : 1;                // at most: see cluster_fits
    });
    return known[device];
}

// Makes a device the current one, and the one before it again at the end.
class OnDevice {
    int before = -1;
public:
    cudaError_t error;
    explicit OnDevice(int device) {
        int current = -1;
        error = cudaGetDevice(&current);
        if (error != cudaSuccess || current == device) return;
        error = cudaSetDevice(device);
        before = current;
    }
    ~OnDevice() { if (before >= 0) cudaSetDevice(before); }
};

// What a launch and the question whether it can run have in common. The kernel may have all shared memory of a block:
// set to what one launch needs, the limit would be another one for a launch of the same kernel on another thread.
struct Shape {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute dimension;
    template <class Kernel>
    Shape(Kernel kernel, int64_t blocks, int threads, int shared_bytes, int cluster, cudaStream_t stream,
          cudaError_t* error) {
        config.gridDim = dim3(unsigned(blocks));
        config.blockDim = dim3(unsigned(threads));
        config.dynamicSmemBytes = size_t(shared_bytes);
        config.stream = stream;
        dimension.id = cudaLaunchAttributeClusterDimension;
        dimension.val.clusterDim.x = unsigned(cluster);
        dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
        config.attrs = &dimension;
        config.numAttrs = cluster > 1;
        int device = 0;
        if (shared_bytes <= 48 * 1024 || (*error = cudaGetDevice(&device)) != cudaSuccess) return;
        const int most = device_info(device).shared_bytes;
        *error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
};

// `kernel` with `blocks` blocks, of which `cluster` at a time work together
template <class Job>
inline const char* launch(void (*kernel)(Job), int64_t blocks, int threads, int shared_bytes, int cluster, void* stream,
                          const Job& job) {
    if (blocks > 0x7fffffff) return "too many rows for one launch";
    cudaError_t e = cudaSuccess;
    const Shape shape(kernel, blocks, threads, shared_bytes, cluster, static_cast<cudaStream_t>(stream), &e);
    return message(e != cudaSuccess ? e : cudaLaunchKernelEx(&shape.config, kernel, job));
}

// Can clusters of this kernel run at all? Asked once for each device, kernel and shape.
template <class Job>
inline bool cluster_fits(void (*kernel)(Job), int device, int cluster, int threads, int shared_bytes) {
    static std::mutex lock;
    static std::map<std::tuple<void (*)(Job), int, int, int>, bool> known;
    std::lock_guard<std::mutex> hold(lock);
    const auto key = std::make_tuple(kernel, device, cluster, shared_bytes);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
    cudaError_t e = cudaSuccess;
    const Shape shape(kernel, cluster, threads, shared_bytes, cluster, nullptr, &e);
    int clusters = 0;
    const bool fits = e == cudaSuccess &&
                      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                      cudaOccupancyMaxActiveClusters(&clusters, kernel, &shape.config) == cudaSuccess && clusters > 0;
    cudaGetLastError();                                             // a refusal here is an answer, not an error
    return known[key] = fits;
}

inline const char* fill_zero(void* p, size_t bytes, void* stream) {
    return p && bytes ? message(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream))) : nullptr;
}

}  // namespace kdlab
#endif
