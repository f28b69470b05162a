// What both Python modules do with their arguments: integers become checked parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "gather.h"

namespace actcache {

inline GatherParams checked_params(std::uintptr_t src, std::int64_t n_src_rows, std::int64_t n_cols,
                                   std::int64_t elem_bytes, std::int64_t row_stride, std::int64_t col_stride,
                                   std::uintptr_t row_ids, std::int64_t n_rows, std::uintptr_t dst) {
    const GatherParams params{reinterpret_cast<const unsigned char*>(src),
                              reinterpret_cast<const std::int64_t*>(row_ids),
                              reinterpret_cast<unsigned char*>(dst),
                              n_src_rows,
                              n_rows,
                              n_cols,
                              row_stride,
                              col_stride,
                              elem_bytes};
    const ParamError error = check(params);
    if (error != ParamError::none) throw pybind11::value_error(std::string("gather_rows: ") + describe(error));
    return params;
}

}  // namespace actcache
