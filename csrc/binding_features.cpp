// Python's door to the losses on features. The callers are in kdlab.feature_ops.
#include <pybind11/pybind11.h>

#include <tuple>

#include "kdlab_features.h"

namespace py = pybind11;

namespace {

typedef std::tuple<int64_t, int64_t, int64_t> Shape;

template <class T>
T* pointer(intptr_t address) { return reinterpret_cast<T*>(address); }

void features(intptr_t student, intptr_t teacher, intptr_t mask, intptr_t grad_in, intptr_t grad, intptr_t out, int loss,
              int dtype, int loss_dtype, int64_t samples, Shape student_shape, Shape teacher_shape, int reduction,
              int threads) {
    kdlab_features a;
    a.student = pointer<const void>(student);
    a.teacher = pointer<const void>(teacher);
    a.mask = pointer<const uint8_t>(mask);
    a.grad_in = pointer<const void>(grad_in);
    a.grad = pointer<void>(grad);
    a.out = pointer<void>(out);
    a.loss = loss;
    a.dtype = dtype;
    a.loss_dtype = loss_dtype;
    a.samples = samples;
    std::tie(a.student_shape[0], a.student_shape[1], a.student_shape[2]) = student_shape;
    std::tie(a.teacher_shape[0], a.teacher_shape[1], a.teacher_shape[2]) = teacher_shape;
    a.reduction = reduction;
    a.threads = threads;
    py::gil_scoped_release release;
    kdlab_features_cpu(&a);
}

void angles(intptr_t student, intptr_t teacher, intptr_t mask, intptr_t out, intptr_t grad, int64_t count, int threads) {
    kdlab_angles a;
    a.student = pointer<const double>(student);
    a.teacher = pointer<const double>(teacher);
    a.mask = pointer<const uint8_t>(mask);
    a.out = pointer<double>(out);
    a.grad = pointer<double>(grad);
    a.count = count;
    a.threads = threads;
    py::gil_scoped_release release;
    kdlab_angles_cpu(&a);
}

void gram(intptr_t student, intptr_t teacher, intptr_t mask, intptr_t gram, intptr_t teacher_gram, intptr_t slopes,
          intptr_t grad, int student_dtype, int teacher_dtype, int wide, bool centre, int64_t count, int64_t columns,
          int threads) {
    kdlab_gram a;
    a.student = pointer<const void>(student);
    a.teacher = pointer<const void>(teacher);
    a.mask = pointer<const uint8_t>(mask);
    a.gram = pointer<double>(gram);
    a.teacher_gram = pointer<double>(teacher_gram);
    a.slopes = pointer<const double>(slopes);
    a.grad = pointer<void>(grad);
    a.student_dtype = student_dtype;
    a.teacher_dtype = teacher_dtype;
    a.wide = wide;
    a.centre = centre;
    a.count = count;
    a.columns = columns;
    a.threads = threads;
    py::gil_scoped_release release;
    kdlab_gram_cpu(&a);
}

void dist(intptr_t student, intptr_t teacher, intptr_t mask, intptr_t grad_in, intptr_t grad, intptr_t out, int dtype,
          int loss_dtype, int64_t rows, int64_t cols, int64_t student_stride, int64_t teacher_stride, double T, double factor,
          int threads) {
    kdlab_dist a;
    a.student = pointer<const void>(student);
    a.teacher = pointer<const void>(teacher);
    a.mask = pointer<const uint8_t>(mask);
    a.grad_in = pointer<const void>(grad_in);
    a.grad = pointer<void>(grad);
    a.out = pointer<void>(out);
    a.dtype = dtype;
    a.loss_dtype = loss_dtype;
    a.rows = rows;
    a.cols = cols;
    a.student_stride = student_stride;
    a.teacher_stride = teacher_stride;
    a.T = T;
    a.factor = factor;
    a.threads = threads;
    py::gil_scoped_release release;
    kdlab_dist_cpu(&a);
}

}  // namespace

void bind_features(py::module_& m) {
    m.def("features", &features, "Losses on features, a value for each sample; see csrc/kdlab_features.h.");
    m.def("angles", &angles, "Smooth L1 between the angles of all triangles; see csrc/kdlab_features.h.");
    m.def("gram", &gram, "Gram matrices of samples, and their gradient; see csrc/kdlab_features.h.");
    m.def("dist", &dist, "DIST on logits; see csrc/kdlab_features.h.");
}
