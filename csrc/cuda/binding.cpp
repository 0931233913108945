// Python's door to the CUDA kernels, the module kdlab._CUDA. The callers are in kdlab.cuda_ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "../kdlab_cuda.h"

namespace py = pybind11;

namespace {

typedef std::tuple<int64_t, int64_t, int64_t> Shape;

template <class T>
T* pointer(intptr_t address) { return reinterpret_cast<T*>(address); }

kdlab_cuda_place place_of(int device, intptr_t stream, intptr_t workspace) {
    return {device, pointer<void>(stream), pointer<double>(workspace)};
}

void check(const char* error) {
    if (error) throw std::runtime_error(std::string("CUDA: ") + error);
}

// A number, or the address of one on the device
struct Number { double value; intptr_t address; };
Number number(const std::tuple<double, intptr_t>& x) { return {std::get<0>(x), std::get<1>(x)}; }

void rows(intptr_t student, intptr_t teacher, intptr_t target, intptr_t mask, intptr_t row_weight, intptr_t grad_in,
          intptr_t grad, intptr_t kl_rows, intptr_t ce_rows, intptr_t out, int dtype, int loss_dtype, int64_t count,
          int64_t cols, int64_t student_stride, int64_t teacher_stride, std::tuple<double, intptr_t> T, bool t_squared,
          std::tuple<double, intptr_t> kl_weight, std::tuple<double, intptr_t> ce_weight, int reduction,
          std::tuple<double, intptr_t> normalizer, int64_t ignore_index, int kind, double mix, double others,
          int device, intptr_t stream, intptr_t workspace) {
    kdlab_cuda_rows a = {};
    a.rows.student = pointer<const void>(student);
    a.rows.teacher = pointer<const void>(teacher);
    a.rows.target = pointer<const int64_t>(target);
    a.rows.mask = pointer<const uint8_t>(mask);
    a.rows.row_weight = pointer<const void>(row_weight);
    a.rows.grad_in = pointer<const void>(grad_in);
    a.rows.grad = pointer<void>(grad);
    a.rows.kl_rows = pointer<void>(kl_rows);
    a.rows.ce_rows = pointer<void>(ce_rows);
    a.rows.out = pointer<void>(out);
    a.rows.dtype = dtype;
    a.rows.loss_dtype = loss_dtype;
    a.rows.rows = count;
    a.rows.cols = cols;
    a.rows.student_stride = student_stride;
    a.rows.teacher_stride = teacher_stride;
    a.rows.reduction = reduction;
    a.rows.ignore_index = ignore_index;
    a.rows.kind = kind;
    a.rows.mix = mix;
    a.rows.others = others;
    a.rows.T = number(T).value;
    a.T = pointer<const double>(number(T).address);
    a.rows.kl_weight = number(kl_weight).value;
    a.kl_weight = pointer<const double>(number(kl_weight).address);
    a.rows.ce_weight = number(ce_weight).value;
    a.ce_weight = pointer<const double>(number(ce_weight).address);
    a.rows.normalizer = number(normalizer).value;
    a.normalizer = pointer<const double>(number(normalizer).address);
    a.t_squared = t_squared;
    a.place = place_of(device, stream, workspace);
    py::gil_scoped_release release;
    const char* error = kdlab_rows_cuda(&a);
    py::gil_scoped_acquire acquire;
    check(error);
}

void scale(intptr_t grad, int dtype, int64_t rows, int64_t cols, intptr_t factor, int factor_dtype, bool per_row,
           int device, intptr_t stream) {
    kdlab_scale a = {};
    a.grad = pointer<void>(grad);
    a.factor = pointer<const void>(factor);
    a.dtype = dtype;
    a.factor_dtype = factor_dtype;
    a.rows = rows;
    a.cols = cols;
    a.per_row = per_row;
    const kdlab_cuda_place place = place_of(device, stream, 0);
    check(kdlab_scale_cuda(&a, &place));
}

kdlab_features features_of(int loss, int dtype, int loss_dtype, int64_t samples, Shape student_shape,
                           Shape teacher_shape, int reduction) {
    kdlab_features a = {};
    a.loss = loss;
    a.dtype = dtype;
    a.loss_dtype = loss_dtype;
    a.samples = samples;
    std::tie(a.student_shape[0], a.student_shape[1], a.student_shape[2]) = student_shape;
    std::tie(a.teacher_shape[0], a.teacher_shape[1], a.teacher_shape[2]) = teacher_shape;
    a.reduction = reduction;
    return a;
}

int64_t feature_workspace(int loss, int dtype, int64_t samples, Shape student_shape, Shape teacher_shape) {
    const kdlab_features a = features_of(loss, dtype, 0, samples, student_shape, teacher_shape, 0);
    return kdlab_cuda_feature_workspace(&a);
}

void features(intptr_t student, intptr_t teacher, intptr_t mask, intptr_t grad_in, intptr_t grad, intptr_t out,
              int loss, int dtype, int loss_dtype, int64_t samples, Shape student_shape, Shape teacher_shape,
              int reduction, int device, intptr_t stream, intptr_t workspace) {
    kdlab_features a = features_of(loss, dtype, loss_dtype, samples, student_shape, teacher_shape, reduction);
    a.student = pointer<const void>(student);
    a.teacher = pointer<const void>(teacher);
    a.mask = pointer<const uint8_t>(mask);
    a.grad_in = pointer<const void>(grad_in);
    a.grad = pointer<void>(grad);
    a.out = pointer<void>(out);
    const kdlab_cuda_place place = place_of(device, stream, workspace);
    check(kdlab_features_cuda(&a, &place));
}

py::tuple devices() {
    const char* why = nullptr;
    const int count = kdlab_cuda_devices(&why);
    return py::make_tuple(count < 0 ? 0 : count, why ? py::object(py::str(why)) : py::object(py::none()));
}

py::object unsupported(int device) {
    const char* why = kdlab_cuda_unsupported(device);
    return why ? py::object(py::str(why)) : py::object(py::none());
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) {
    m.doc() = "The CUDA kernels of kdlab: addresses and sizes in, no tensors. It loads without a driver.";
    m.attr("archs") = KDLAB_CUDA_ARCHS;
    m.def("devices", &devices, "How many devices there are, and why none, or None.");
    m.def("unsupported", &unsupported, "Why the kernels do not run on a device, or None.");
    m.def("workspace", &kdlab_cuda_workspace, "Numbers of float64 that `rows` needs for that many rows.");
    m.def("rows", &rows, "Divergences and cross-entropy of rows; see csrc/kdlab_cuda.h.");
    m.def("scale", &scale, "grad *= factor in place, one factor or one per row; free where one factor is 1.");
    m.def("feature_workspace", &feature_workspace, "Numbers of float64 that `features` needs.");
    m.def("features", &features, "Losses on features, a value for each sample; see csrc/kdlab_cuda.h.");
    m.def("limits", &kdlab_cuda_limits, "Plan for less memory a block and smaller clusters; 0: as they are.");
}
