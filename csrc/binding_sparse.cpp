// Python's door to the divergences from a sparse teacher. The callers are in kdlab.sparse_ops.
#include <pybind11/pybind11.h>

#include "kdlab_sparse.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(intptr_t address) { return reinterpret_cast<T*>(address); }

int64_t sparse(intptr_t student, intptr_t log_probs, intptr_t ids, intptr_t mask, intptr_t row_weight, intptr_t grad_in,
               intptr_t grad, intptr_t out, int dtype, int loss_dtype, int64_t rows, int64_t cols, int64_t student_stride,
               int64_t k, double T, double factor, int reduction, double normalizer, bool reverse, int tail, int threads) {
    kdlab_sparse a;
    a.student = pointer<const void>(student);
    a.log_probs = pointer<const double>(log_probs);
    a.ids = pointer<const int64_t>(ids);
    a.mask = pointer<const uint8_t>(mask);
    a.row_weight = pointer<const void>(row_weight);
    a.grad_in = pointer<const void>(grad_in);
    a.grad = pointer<void>(grad);
    a.out = pointer<void>(out);
    a.dtype = dtype;
    a.loss_dtype = loss_dtype;
    a.rows = rows;
    a.cols = cols;
    a.student_stride = student_stride;
    a.k = k;
    a.T = T;
    a.factor = factor;
    a.reduction = reduction;
    a.normalizer = normalizer;
    a.reverse = reverse;
    a.tail = tail;
    a.threads = threads;
    py::gil_scoped_release release;
    return kdlab_sparse_cpu(&a);
}

}  // namespace

void bind_sparse(py::module_& m) {
    m.def("sparse", &sparse, "KL between a sparse teacher and the student; see csrc/kdlab_sparse.h.");
}
