// Row scatter, the way back of the gather: dst[row_ids[i], :] = src[i, :], src contiguous and dst of any strides.
//
// The geometry is the gather's with the two sides exchanged, so its checks and its row arithmetic serve here as well.
// Expand (a row to several places) is a gather with repeated ids. Repeated ids are refused here before it comes to
// this: which of two rows would stay is the order of threads.
#pragma once

#include "gather.h"

namespace actcache {

struct ScatterParams {
    const unsigned char* src;     // [n_rows, n_cols], contiguous
    const std::int64_t* row_ids;  // [n_rows], each in 0..n_dst_rows-1, all different
    unsigned char* dst;           // [n_dst_rows, n_cols], no two elements in one place; apart from src and row_ids
    std::int64_t n_dst_rows;
    std::int64_t n_rows;
    std::int64_t n_cols;
    std::int64_t row_stride;  // bytes, of dst
    std::int64_t col_stride;  // bytes, of dst
    std::int64_t elem_bytes;  // 1, 2, 4 or 8
};
static_assert(sizeof(ScatterParams) == 72, "no padding: one layout for host, device and whoever packs it by hand");

// The gather that would undo it, for the checks: nothing is ever written through its dst.
inline GatherParams undoing(const ScatterParams& p) {
    return {p.dst,        p.row_ids,    const_cast<unsigned char*>(p.src),
            p.n_dst_rows, p.n_rows,     p.n_cols,
            p.row_stride, p.col_stride, p.elem_bytes};
}

ACTCACHE_INLINE const unsigned char* source_row(const ScatterParams& p, std::int64_t i) {
    return p.src + i * (p.n_cols * p.elem_bytes);
}

ACTCACHE_INLINE unsigned char* destination_row(const ScatterParams& p, std::int64_t i) {
    return p.dst + p.row_ids[i] * p.row_stride;
}

// scatter_cpu.cpp. Parameters must have passed check(), ids first_bad_id(), both of undoing(params).
void scatter_rows_cpu(const ScatterParams& params, int n_threads);

// scatter_cuda.cu. As gather_rows_cuda; src is device memory or page-locked host memory.
int scatter_rows_cuda(const ScatterParams& params, void* stream);

}  // namespace actcache
