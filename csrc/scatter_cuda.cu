// Row scatter on CUDA:  nvcc -ptx -arch=sm_80 scatter_cuda.cu
//
// The source may be page-locked host memory: each byte of it is read once, as it is needed.
#include "row_kernel.cuh"
#include "scatter.h"

namespace actcache {

// A plain name, so that it can be found in the PTX.
extern "C" __global__ void __launch_bounds__(kThreads) actcache_scatter_rows(const ScatterParams p) {
    for (std::int64_t i = first_row(); i < p.n_rows; i += rows_per_step()) {
        copy_row(source_row(p, i), p.elem_bytes, destination_row(p, i), p.col_stride, p.n_cols, p.elem_bytes);
    }
}

int scatter_rows_cuda(const ScatterParams& params, void* stream) {
    if (check_for_device(undoing(params)) != nullptr) return static_cast<int>(cudaErrorInvalidValue);
    if (params.n_rows == 0 || params.n_cols == 0) return static_cast<int>(cudaSuccess);
    const bool runs = params.col_stride == params.elem_bytes;
    const dim3 block = block_for(runs ? params.n_cols * params.elem_bytes / kWidestAccess : params.n_cols);
    actcache_scatter_rows<<<grid_for(params.n_rows, block), block, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace actcache
