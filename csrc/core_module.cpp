// actcache._core: the CPU side. Pointers come as integers; their owners are the caller's tensors.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "gather.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, module) {
    module.doc() = "Native core of actcache: row gather on the CPU.";
    module.def(
        "gather_rows",
        [](std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t dst, int n_threads) {
            const auto params = actcache::checked_params(src, n_src_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                         row_ids, n_rows, dst);
            const std::int64_t bad = actcache::first_bad_id(params);
            if (bad != n_rows) {
                throw py::index_error("row_ids[" + std::to_string(bad) + "] is " + std::to_string(params.row_ids[bad]) +
                                      ", outside 0.." + std::to_string(n_src_rows - 1));
            }
            const py::gil_scoped_release unlocked;
            actcache::gather_rows_cpu(params, n_threads);
        },
        py::arg("src"), py::arg("n_src_rows"), py::arg("n_cols"), py::arg("elem_bytes"), py::arg("row_stride"),
        py::arg("col_stride"), py::arg("row_ids"), py::arg("n_rows"), py::arg("dst"), py::arg("n_threads"),
        "Copy rows src[row_ids[i], :] to the contiguous dst; strides in bytes. IndexError before anything is written.");
}
