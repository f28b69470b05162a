// What both Python modules do with their arguments: integers become checked parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "gather.h"
#include "planes.h"
#include "scatter.h"

namespace actcache {

inline GatherParams make_gather(std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols,
                                std::int64_t elem_bytes, std::int64_t row_stride, std::int64_t col_stride,
                                std::uintptr_t row_ids, std::int64_t n_rows, std::uintptr_t dst) {
    return {reinterpret_cast<const unsigned char*>(src),
            reinterpret_cast<const std::int64_t*>(row_ids),
            reinterpret_cast<unsigned char*>(dst),
            n_src_rows,
            n_rows,
            n_cols,
            row_stride,
            col_stride,
            elem_bytes};
}

inline ScatterParams make_scatter(std::uintptr_t dst, std::int64_t n_dst_rows, std::int64_t n_cols,
                                  std::int64_t elem_bytes, std::int64_t row_stride, std::int64_t col_stride,
                                  std::uintptr_t row_ids, std::int64_t n_rows, std::uintptr_t src) {
    return {reinterpret_cast<const unsigned char*>(src),
            reinterpret_cast<const std::int64_t*>(row_ids),
            reinterpret_cast<unsigned char*>(dst),
            n_dst_rows,
            n_rows,
            n_cols,
            row_stride,
            col_stride,
            elem_bytes};
}

// `name` is the function's; `table` its side of many rows, src or dst.
inline void raise_refusal(const char* name, const char* table, const GatherParams& p, const char* refusal) {
    if (refusal == nullptr) return;
    const auto number = [](const std::string& what, std::int64_t value) { return what + std::to_string(value); };
    throw pybind11::value_error(std::string(name) + ": " + refusal +
                                number(std::string(" (n_") + table + "_rows ", p.n_src_rows) +
                                number(", n_cols ", p.n_cols) + number(", elem_bytes ", p.elem_bytes) +
                                number(", row_stride_bytes ", p.row_stride) +
                                number(", col_stride_bytes ", p.col_stride) + number(", n_rows ", p.n_rows) + ")");
}

}  // namespace actcache
