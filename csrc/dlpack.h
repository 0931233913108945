// The part of the DLPack ABI (github.com/dmlc/dlpack, version 1) that kdlab speaks: how a tensor is described, how its
// memory is handed over, and the table through which torch (2.13 at the latest) describes their tensors to C.
#pragma once
#include <stdint.h>

enum { DL_CPU = 1 };                          // a device
enum { DL_FLOAT = 2, DL_BFLOAT = 4, DL_INT = 0 };   // codes of a dtype

struct DLDevice { int32_t type, id; };
struct DLDataType { uint8_t code, bits; uint16_t lanes; };

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;                         // in elements; null: contiguous
    uint64_t byte_offset;
};

struct DLManagedTensor {                      // in a capsule named "dltensor"
    DLTensor dl_tensor;
    void* manager_ctx;
    void (*deleter)(DLManagedTensor*);
};

struct DLManagedTensorVersioned {
    struct { uint32_t major, minor; } version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned*);
    uint64_t flags;
    DLTensor dl_tensor;
};

struct DLPackExchangeAPI {                    // in a capsule named "dlpack_exchange_api"
    struct { uint32_t major, minor; } version;
    DLPackExchangeAPI* previous;
    int (*allocate)(DLTensor*, DLManagedTensorVersioned**, void*, void (*)(void*, const char*, const char*));
    int (*managed_from_object)(void*, DLManagedTensorVersioned**);
    int (*managed_to_object)(DLManagedTensorVersioned*, void**);   // takes the tensor over
    int (*tensor_from_object)(void*, DLTensor*);                   // borrowed; 0 or -1 with a Python exception
    int (*current_stream)(int32_t, int32_t, void**);
};
