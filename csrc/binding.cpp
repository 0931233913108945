// Python's door to the core: raw addresses, sizes and numbers in, no tensors. The callers are in kdlab.ops.
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "kdlab.h"

namespace py = pybind11;

void bind_features(py::module_& m);      // binding_features.cpp

namespace {

template <class T>
T* pointer(intptr_t address) { return reinterpret_cast<T*>(address); }

int64_t soft_kl(intptr_t student, intptr_t teacher, intptr_t target, intptr_t mask, intptr_t row_weight,
                intptr_t grad_in, intptr_t grad, intptr_t kl_rows, intptr_t ce_rows, intptr_t out, int dtype,
                int loss_dtype, int64_t rows, int64_t cols, int64_t student_stride, int64_t teacher_stride, double T,
                double kl_factor, double kl_weight, double ce_weight, int reduction, double normalizer,
                int64_t ignore_index, int threads, int kind, double mix) {
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
          "mix"_a = 0.0);
    m.def("scale", &scale, "grad *= factor in place, one factor or one per row.");
    m.def("info", &info, "Instruction set in use, those that run here, OpenMP, threads, compiler.");
    m.def("set_isa", &set_isa, "Use avx512, avx2 or base, or the best below it that this CPU has.");
    bind_features(m);
}
