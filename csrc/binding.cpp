// Python's door to the core. The callers are in kdlab.ops. The general entries take raw addresses, sizes and numbers;
// the memory of large gradients, and the quick entry for the ordinary case, go through DLPack. Nothing needs torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "dlpack.h"
#include "kdlab.h"
#include "pool.h"

namespace py = pybind11;

void bind_features(py::module_& m);      // binding_features.cpp
void bind_sparse(py::module_& m);        // binding_sparse.cpp

namespace {

template <class T>
T* pointer(intptr_t address) { return reinterpret_cast<T*>(address); }

int64_t soft_kl(intptr_t student, intptr_t teacher, intptr_t target, intptr_t mask, intptr_t row_weight,
                intptr_t grad_in, intptr_t grad, intptr_t kl_rows, intptr_t ce_rows, intptr_t out, int dtype,
                int loss_dtype, int64_t rows, int64_t cols, int64_t student_stride, int64_t teacher_stride, double T,
                double kl_factor, double kl_weight, double ce_weight, int reduction, double normalizer,
                int64_t ignore_index, int threads, int kind, double mix, double others) {
    kdlab_soft_kl a;
    a.student = pointer<const void>(student);
    a.teacher = pointer<const void>(teacher);
    a.target = pointer<const int64_t>(target);
    a.mask = pointer<const uint8_t>(mask);
    a.row_weight = pointer<const void>(row_weight);
    a.grad_in = pointer<const void>(grad_in);
    a.grad = pointer<void>(grad);
    a.kl_rows = pointer<void>(kl_rows);
    a.ce_rows = pointer<void>(ce_rows);
    a.out = pointer<void>(out);
    a.dtype = dtype;
    a.loss_dtype = loss_dtype;
    a.rows = rows;
    a.cols = cols;
    a.student_stride = student_stride;
    a.teacher_stride = teacher_stride;
    a.T = T;
    a.kl_factor = kl_factor;
    a.kl_weight = kl_weight;
    a.ce_weight = ce_weight;
    a.reduction = reduction;
    a.normalizer = normalizer;
    a.ignore_index = ignore_index;
    a.threads = threads;
    a.kind = kind;
    a.mix = mix;
    a.others = others;
    py::gil_scoped_release release;
    return kdlab_soft_kl_cpu(&a);
}

void scale(intptr_t grad, int dtype, int64_t rows, int64_t cols, intptr_t factor, int factor_dtype, bool per_row,
           int threads) {
    kdlab_scale a;
    a.grad = pointer<void>(grad);
    a.factor = pointer<const void>(factor);
    a.dtype = dtype;
    a.factor_dtype = factor_dtype;
    a.rows = rows;
    a.cols = cols;
    a.per_row = per_row;
    a.threads = threads;
    py::gil_scoped_release release;
    kdlab_scale_cpu(&a);
}

// ---- memory that a tensor owns -------------------------------------------------------------------------------------
// A DLPack tensor, contiguous on the CPU, in one allocation with its shape and, if small, its data. Large data come
// from the pool. Freed by torch, on any thread and without the GIL, when the last tensor over it dies.
template <class Managed>
struct Owned {
    static constexpr int most_dims = 8;
    static constexpr size_t data_offset = 384;     // of small data; a multiple of the cache line

    Managed managed;
    int64_t shape[most_dims];
    int64_t strides[most_dims];
    kdlab::Buffer buffer;                          // no data: they lie behind this struct

    static Managed* create(const int64_t* shape, int dims, int dtype) {
        static const DLDataType types[] = {{DL_FLOAT, 32, 1}, {DL_FLOAT, 64, 1}, {DL_BFLOAT, 16, 1}, {DL_FLOAT, 16, 1}};
        size_t bytes = types[dtype].bits / 8;
        for (int i = 0; i < dims; ++i) bytes *= static_cast<size_t>(shape[i]);
        bool large = bytes >= kdlab::pooled_from;
        kdlab::Buffer buffer = large ? kdlab::pool_take(bytes) : kdlab::Buffer{nullptr, 0};
        void* memory = large && !buffer.data ? nullptr : kdlab::aligned_allocate(data_offset + (large ? 0 : bytes));
        if (!memory) {
            if (buffer.data) kdlab::pool_give(buffer);
            throw std::bad_alloc();
        }
        Owned* self = new (memory) Owned{};
        self->buffer = buffer;
        DLTensor& t = self->managed.dl_tensor;
        t = {large ? buffer.data : static_cast<char*>(memory) + data_offset, {DL_CPU, 0}, dims, types[dtype],
             self->shape, self->strides, 0};
        int64_t stride = 1;
        for (int i = dims - 1; i >= 0; stride *= shape[i--]) {
            self->shape[i] = shape[i];
            self->strides[i] = stride;
        }
        self->managed.manager_ctx = self;
        self->managed.deleter = [](Managed* m) {
            Owned* dead = static_cast<Owned*>(m->manager_ctx);
            if (dead->buffer.data) kdlab::pool_give(dead->buffer);
            kdlab::aligned_release(dead);
        };
        return &self->managed;
    }
};
static_assert(sizeof(Owned<DLManagedTensorVersioned>) <= Owned<DLManagedTensorVersioned>::data_offset, "overlap");

// An uninitialised tensor as a DLPack capsule, for torch.from_dlpack.
py::object empty(const std::vector<int64_t>& shape, int dtype) {
    if (shape.size() > Owned<DLManagedTensor>::most_dims) throw py::value_error("empty: at most 8 dimensions");
    DLManagedTensor* tensor = Owned<DLManagedTensor>::create(shape.data(), static_cast<int>(shape.size()), dtype);
    PyObject* capsule = PyCapsule_New(tensor, "dltensor", [](PyObject* unused) {
        if (!PyCapsule_IsValid(unused, "dltensor")) return;          // a tensor has taken it over
        auto* t = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(unused, "dltensor"));
        t->deleter(t);
    });
    if (!capsule) {
        tensor->deleter(tensor);
        throw py::error_already_set();
    }
    return py::reinterpret_steal<py::object>(capsule);
}

// ---- the ordinary case in one call ---------------------------------------------------------------------------------
// Plain contiguous tensors of one dtype on the CPU, numbers that are Python floats, the mean over all rows that count.
// On a batch of classroom size, asking the tensors for all this from Python costs several times the kernel; from
// torch 2.13 at the latest they describe themselves to C through the table `torch_tensors`.
const DLPackExchangeAPI* torch_tensors = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

bool learn_tensors(py::type tensor, py::type parameter) {
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());          // kept for ever
    parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
    PyObject* table = PyObject_GetAttrString(reinterpret_cast<PyObject*>(tensor_type), "__dlpack_c_exchange_api__");
    if (table && PyCapsule_IsValid(table, "dlpack_exchange_api")) {
        auto* api = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(table, "dlpack_exchange_api"));
        if (api->version.major == 1 && api->tensor_from_object) torch_tensors = api;
    }
    PyErr_Clear();
    Py_XDECREF(table);
    return torch_tensors;
}

// A plain tensor on the CPU, contiguous. Subclasses and everything else are not ordinary.
bool read_plain(PyObject* object, DLTensor* t) {
    if (!torch_tensors || (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type)) return false;
    if (torch_tensors->tensor_from_object(object, t) != 0) {
        PyErr_Clear();
        return false;
    }
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; stride *= t->shape[i--])
        if (t->shape[i] != 1 && t->strides && t->strides[i] != stride) return false;
    return t->device.type == DL_CPU && t->byte_offset == 0 && t->dtype.lanes == 1;
}

int dtype_code(const DLTensor& t) {              // -1: none of ours
    if (t.dtype.code == DL_BFLOAT) return KDLAB_BF16;
    if (t.dtype.code != DL_FLOAT) return -1;
    return t.dtype.bits == 32 ? KDLAB_F32 : t.dtype.bits == 64 ? KDLAB_F64 : t.dtype.bits == 16 ? KDLAB_F16 : -1;
}

bool same_shape(const DLTensor& a, int dims, const DLTensor& b) {
    return b.ndim == dims && std::memcmp(a.shape, b.shape, dims * sizeof(int64_t)) == 0;
}

bool requires_grad(PyObject* tensor) {
    static PyObject* name = PyUnicode_InternFromString("requires_grad");
    PyObject* answer = PyObject_GetAttr(tensor, name);
    Py_XDECREF(answer);
    return answer == Py_True;
}

PyObject* as_tensor(DLManagedTensorVersioned* managed) {
    managed->version = {1, 0};
    void* object = nullptr;
    if (torch_tensors->managed_to_object(managed, &object) != 0) return nullptr;
    return static_cast<PyObject*>(object);
}

typedef Owned<DLManagedTensorVersioned> OwnedTensor;

// ordinary(student, teacher, target or None, T, t_squared, kl_weight, ce_weight, ignore_index, kind, mix, others,
// grad_enabled, threads) -> (loss, gradient or None), or None if the case is not ordinary: then the general path answers or raises.
PyObject* ordinary(PyObject*, PyObject* const* args, Py_ssize_t count) {
    DLTensor student, teacher, target;
    if (count != 13 || !read_plain(args[0], &student) || !read_plain(args[1], &teacher)) Py_RETURN_NONE;
    int dims = student.ndim, dtype = dtype_code(student);
    bool numbers = (PyFloat_CheckExact(args[3]) || PyLong_CheckExact(args[3])) && PyFloat_CheckExact(args[5]) &&
                   PyFloat_CheckExact(args[6]);
    if (!numbers || dtype < 0 || dtype != dtype_code(teacher) || dims < 1 || dims > OwnedTensor::most_dims ||
        !same_shape(student, dims, teacher) || requires_grad(args[1])) Py_RETURN_NONE;
    bool labelled = args[2] != Py_None;
    if (labelled && (!read_plain(args[2], &target) || target.dtype.code != DL_INT || target.dtype.bits != 64 ||
                     !same_shape(student, dims - 1, target))) Py_RETURN_NONE;
    bool need_grad = args[11] == Py_True && requires_grad(args[0]);
    double T = PyFloat_AsDouble(args[3]);
    PyErr_Clear();                                                 // an integer beyond all floats; T is -1 then
    if (!(T > 0 && T < INFINITY) || (need_grad && dtype == KDLAB_F16)) Py_RETURN_NONE;   // its gradient waits

    kdlab_soft_kl a = {};
    a.student = student.data;
    a.teacher = teacher.data;
    a.target = labelled ? static_cast<const int64_t*>(target.data) : nullptr;
    a.dtype = dtype;
    a.loss_dtype = dtype == KDLAB_F64 ? KDLAB_F64 : KDLAB_F32;
    a.rows = 1;
    for (int i = 0; i + 1 < dims; ++i) a.rows *= student.shape[i];
    a.cols = a.student_stride = a.teacher_stride = student.shape[dims - 1];
    a.T = T;
    a.kl_factor = args[4] == Py_True ? T * T : 1;
    a.kl_weight = PyFloat_AS_DOUBLE(args[5]);
    a.ce_weight = PyFloat_AS_DOUBLE(args[6]);
    a.reduction = KDLAB_MEAN;
    a.normalizer = NAN;
    a.ignore_index = PyLong_AsLongLong(args[7]);
    a.kind = static_cast<int>(PyLong_AsLong(args[8]));
    a.mix = PyFloat_AsDouble(args[9]);
    a.others = PyFloat_AsDouble(args[10]);
    a.threads = static_cast<int>(PyLong_AsLong(args[12]));
    if (PyErr_Occurred() || (!labelled && kdlab_kind_has_label(a.kind))) {
        PyErr_Clear();
        Py_RETURN_NONE;
    }

    DLManagedTensorVersioned *loss = nullptr, *grad = nullptr;
    try {
        loss = OwnedTensor::create(nullptr, 0, a.loss_dtype);
        if (need_grad) grad = OwnedTensor::create(student.shape, dims, dtype);
    } catch (const std::bad_alloc&) {
        if (loss) loss->deleter(loss);
        return PyErr_NoMemory();
    }
    a.out = loss->dl_tensor.data;
    a.grad = grad ? grad->dl_tensor.data : nullptr;
    int64_t bad;
    if (a.rows * a.cols < 32768) bad = kdlab_soft_kl_cpu(&a);      // done before another thread has the GIL
    else {
        py::gil_scoped_release release;
        bad = kdlab_soft_kl_cpu(&a);
    }
    if (bad >= 0) {                                                // the general path names the label
        loss->deleter(loss);
        if (grad) grad->deleter(grad);
        Py_RETURN_NONE;
    }
    PyObject* loss_object = as_tensor(loss);
    PyObject* grad_object = grad ? as_tensor(grad) : Py_NewRef(Py_None);
    PyObject* both = loss_object && grad_object ? PyTuple_Pack(2, loss_object, grad_object) : nullptr;
    Py_XDECREF(loss_object);
    Py_XDECREF(grad_object);
    return both;
}

// multiply(gradient, factor) -> True if that is done, in place: gradient, contiguous, times a factor with one number.
// It costs nothing where the factor is 1. False: not an ordinary case.
PyObject* multiply(PyObject*, PyObject* const* args, Py_ssize_t count) {
    DLTensor grad, factor;
    if (count != 3 || !read_plain(args[0], &grad) || !read_plain(args[1], &factor) || factor.ndim != 0) Py_RETURN_FALSE;
    kdlab_scale a = {};
    a.grad = grad.data;
    a.factor = factor.data;
    a.dtype = dtype_code(grad);
    a.factor_dtype = dtype_code(factor);
    if (a.dtype < 0 || (a.factor_dtype != KDLAB_F32 && a.factor_dtype != KDLAB_F64)) Py_RETURN_FALSE;
    a.rows = 1;
    a.cols = 1;
    for (int i = 0; i < grad.ndim; ++i) (i + 1 < grad.ndim ? a.rows : a.cols) *= grad.shape[i];
    a.threads = static_cast<int>(PyLong_AsLong(args[2]));
    {
        py::gil_scoped_release release;
        kdlab_scale_cpu(&a);
    }
    Py_RETURN_TRUE;
}

PyMethodDef quick_entries[] = {
    {"ordinary", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&ordinary)), METH_FASTCALL,
     "Loss and gradient in the ordinary case, else None; see csrc/binding.cpp."},
    {"multiply", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&multiply)), METH_FASTCALL,
     "gradient *= factor in the ordinary case, else False; see csrc/binding.cpp."},
    {nullptr, nullptr, 0, nullptr}};

py::dict pool() {
    kdlab::PoolInfo info = kdlab::pool_info();
    py::dict d;
    d["limit"] = info.limit;
    d["idle"] = info.idle;
    d["idle_buffers"] = info.idle_buffers;
    d["reused"] = info.reused;
    d["fresh"] = info.fresh;
    return d;
}

py::dict info() {
    py::list isas;
    for (int i = 0; kdlab_isa_at(i); ++i) isas.append(kdlab_isa_at(i));
    py::dict d;
    d["isa"] = kdlab_isa();
    d["isas"] = isas;
#ifdef _OPENMP
    d["openmp"] = static_cast<int>(_OPENMP);
    d["threads"] = omp_get_max_threads();
#else
    d["openmp"] = false;
    d["threads"] = 1;
#endif
#if defined(__VERSION__)
    d["compiler"] = __VERSION__;
#elif defined(_MSC_VER)
    d["compiler"] = "MSVC " + std::to_string(_MSC_VER);
#endif
    return d;
}

void set_isa(const std::string& name) {
    if (kdlab_set_isa(name.c_str()) != 0)
        throw py::value_error("isa must be avx512, avx2 or base, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The compiled core of kdlab: addresses and sizes in, no tensors.";
    using namespace py::literals;
    m.def("soft_kl", &soft_kl, "Softened divergence with optional cross-entropy; see csrc/kdlab.h.", "student"_a,
          "teacher"_a, "target"_a, "mask"_a, "row_weight"_a, "grad_in"_a, "grad"_a, "kl_rows"_a, "ce_rows"_a, "out"_a,
          "dtype"_a, "loss_dtype"_a, "rows"_a, "cols"_a, "student_stride"_a, "teacher_stride"_a, "T"_a, "kl_factor"_a,
          "kl_weight"_a, "ce_weight"_a, "reduction"_a, "normalizer"_a, "ignore_index"_a, "threads"_a, "kind"_a = 0,
          "mix"_a = 0.0, "others"_a = 0.0);
    m.def("scale", &scale, "grad *= factor in place, one factor or one per row.");
    PyModule_AddFunctions(m.ptr(), quick_entries);
    m.def("learn_tensors", &learn_tensors, "Say what a tensor is. False if this torch cannot describe them to C.",
          "tensor"_a, "parameter"_a);
    m.def("empty", &empty, "A tensor on the CPU, uninitialised, as a DLPack capsule; large ones from recycled memory.",
          "shape"_a, "dtype"_a);
    m.def("empty_cache", &kdlab::pool_clear, "Free the recycled memory that nobody uses.");
    m.attr("pooled_from") = kdlab::pooled_from;
    m.def("pool", &pool, "Recycled memory: limit and idle bytes, idle buffers, how often reused and fresh.");
    m.def("info", &info, "Instruction set in use, those that run here, OpenMP, threads, compiler.");
    m.def("set_isa", &set_isa, "Use avx512, avx2 or base, or the best below it that this CPU has.");
    bind_features(m);
    bind_sparse(m);
}
