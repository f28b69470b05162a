// actcache._core: the CPU side. Pointers come as integers; the caller keeps what they point to alive.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
#include "gather.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, module) {
    module.doc() = "Native core of actcache: row gather on the CPU.";
    module.def("version", [] { return ACTCACHE_VERSION; }, "The version of actcache that this module was built from.");
    module.def(
        "gather_rows",
        [](std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols, std::int64_t elem_bytes,
           std::int64_t row_stride, std::int64_t col_stride, std::uintptr_t row_ids, std::int64_t n_rows,
           std::uintptr_t dst, int n_threads) {
            const auto params = actcache::make_params(src, n_src_rows, n_cols, elem_bytes, row_stride, col_stride,
                                                      row_ids, n_rows, dst);
            actcache::raise_refusal(params, actcache::check(params));
            if (n_threads < 1) {
                throw py::value_error("gather_rows: n_threads is " + std::to_string(n_threads) +
                                      ", expected 1 or more");
            }
            const py::gil_scoped_release unlocked;
            const std::int64_t bad = actcache::first_bad_id(params);
            if (bad != n_rows) {
                throw py::index_error("row_ids[" + std::to_string(bad) + "] is " + std::to_string(params.row_ids[bad]) +
                                      ", expected 0 <= id < " + std::to_string(n_src_rows));
            }
            actcache::gather_rows_cpu(params, n_threads);
        },
        py::arg("src_ptr"), py::arg("n_src_rows"), py::arg("n_cols"), py::arg("elem_bytes"),
        py::arg("row_stride_bytes"), py::arg("col_stride_bytes"), py::arg("row_ids_ptr"), py::arg("n_rows"),
        py::arg("dst_ptr"), py::arg("n_threads"),
        "Copy rows src[row_ids[i], :] to the contiguous dst, which must not overlap src. ValueError (sizes) and "
        "IndexError (a row id) are raised before anything is written.");
}
