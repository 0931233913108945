// Which devices there are, and whether the kernels run on them.
#include <cstdio>

#include "../kdlab_cuda.h"
#include "device.h"

using namespace kdlab;

int kdlab_cuda_devices(const char** why) {
    int count = 0;
    const cudaError_t e = cudaGetDeviceCount(&count);
    *why = message(e);
    return e == cudaSuccess ? count : -1;
}

const char* kdlab_cuda_unsupported(int device) {
    static thread_local char line[120];
    if (device >= most_devices) return "the CUDA kernels know 64 devices";
    int major = 0, minor = 0;
    cudaError_t e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (e != cudaSuccess) return message(e);
    if (10 * major + minor >= 75) return nullptr;
    std::snprintf(line, sizeof line, "its compute capability is %d.%d, the kernels need 7.5", major, minor);
    return line;
}
