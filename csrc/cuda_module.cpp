// actcache._cuda: the CUDA side. The runtime is linked in, so the module imports where there is no driver.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "gather.h"

namespace py = pybind11;

namespace {

[[noreturn]] void fail(const char* what, int code) {
    const auto error = static_cast<cudaError_t>(code);
    throw std::runtime_error(std::string(what) + ": CUDA error " + std::to_string(code) + " (" +
                             cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Native core of actcache: row gather on CUDA.";
    module.def(
        "device_count",
        [] {
            int count = 0;
            const cudaError_t error = cudaGetDeviceCount(&count);
            if (error != cudaSuccess) fail("device_count", error);
            return count;
        },
        "Number of CUDA devices; RuntimeError where there is no usable driver.");
    module.def(
        "gather_rows",
        [](std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t dst, std::uintptr_t stream) {
            const auto params = actcache::checked_params(src, n_src_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                         row_ids, n_rows, dst);
            const int error = actcache::gather_rows_cuda(params, reinterpret_cast<void*>(stream));
            if (error != cudaSuccess) fail("gather_rows", error);
        },
        py::arg("src"), py::arg("n_src_rows"), py::arg("n_cols"), py::arg("elem_bytes"), py::arg("row_stride"),
        py::arg("col_stride"), py::arg("row_ids"), py::arg("n_rows"), py::arg("dst"), py::arg("stream"),
        "Queue the copy of rows src[row_ids[i], :] to the contiguous dst on a stream; row ids (device memory) must "
        "have "
        "been checked. RuntimeError with the CUDA error's code and name.");
}
