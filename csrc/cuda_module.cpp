// actcache._cuda: the CUDA side. The runtime is linked in, so the module imports where there is no driver, and each
// call there raises RuntimeError with CUDA's own code and name.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace {

void raise_failure(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // cleared: the next launch must not report it as its own
    throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(static_cast<int>(error)) + " (" +
                             cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Native core of actcache on CUDA: row gather and scatter.";
    module.def("version", [] { return ACTCACHE_VERSION; }, "The version of actcache that this module was built from.");
    module.def(
        "device_count",
        [] {
            int count = 0;
            raise_failure("device_count", cudaGetDeviceCount(&count));
            return count;
        },
        "Number of CUDA devices; RuntimeError where there is no device or no driver new enough.");
    module.def(
        "gather_rows",
        [](std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t dst, std::uintptr_t stream) {
            const auto params = actcache::make_gather(src, n_src_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                      row_ids, n_rows, dst);
            actcache::raise_refusal("gather_rows", "src", params, actcache::check_for_device(params));
            const py::gil_scoped_release unlocked;  // a launch waits where the stream's queue is full
            const int code = actcache::gather_rows_cuda(params, reinterpret_cast<void*>(stream));
            raise_failure("actcache_gather_rows", static_cast<cudaError_t>(code));
        },
        py::arg("src_ptr"), py::arg("n_src_rows"), py::arg("n_cols"), py::arg("elem_bytes"),
        py::arg("row_stride_bytes"), py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"),
        py::arg("dst_ptr"), py::arg("stream"),
        "Queue the copy of rows src[row_ids[i], :] to the contiguous dst on a stream of the current device. The caller "
        "has checked the row ids (device memory), and dst (device or page-locked host memory) overlaps nothing. "
        "ValueError for sizes and alignment; RuntimeError with the kernel's name and the CUDA error's code and name.");
    module.def(
        "scatter_rows",
        [](std::uintptr_t dst, std::int64_t n_dst_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t src, std::uintptr_t stream) {
            const auto params = actcache::make_scatter(dst, n_dst_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                       row_ids, n_rows, src);
            const auto geometry = actcache::undoing(params);
            actcache::raise_refusal("scatter_rows", "dst", geometry, actcache::check_for_device(geometry));
            const py::gil_scoped_release unlocked;
            const int code = actcache::scatter_rows_cuda(params, reinterpret_cast<void*>(stream));
            raise_failure("actcache_scatter_rows", static_cast<cudaError_t>(code));
        },
        py::arg("dst_ptr"), py::arg("n_dst_rows"), py::arg("n_cols"), py::arg("elem_bytes"),
        py::arg("row_stride_bytes"), py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"),
        py::arg("src_ptr"), py::arg("stream"),
        "Queue the copy of rows src[i, :] of the contiguous src (device or page-locked host memory) to dst[row_ids[i], "
        ":]. The caller has checked the row ids, all different. Errors as gather_rows.");
}
