// What the emulated module of CUDA kernels needs beside them: one device, and the order in which its threads run.
#include "cuda_emulator.h"
#include "kdlab_cuda.h"

int kdlab_cuda_devices(const char** why) { *why = nullptr; return 1; }
const char* kdlab_cuda_unsupported(int) { return nullptr; }

extern "C" __attribute__((visibility("default"))) void emulator_order(unsigned order) { emulator::order = order; }
extern "C" __attribute__((visibility("default"))) long emulator_launches() { return emulator::launches; }
