// Row gather on CUDA:  nvcc -ptx -arch=sm_80 gather_cuda.cu
//
// The destination may be page-locked host memory: the writes cross the bus as they are made, and no copy through device
// memory is needed.
#include "row_kernel.cuh"

namespace actcache {

// A plain name, so that it can be found in the PTX.
extern "C" __global__ void __launch_bounds__(kThreads) actcache_gather_rows(const GatherParams p) {
    for (std::int64_t i = first_row(); i < p.n_rows; i += rows_per_step()) {
        copy_row(source_row(p, i), p.col_stride, destination_row(p, i), p.elem_bytes, p.n_cols, p.elem_bytes);
    }
}

int gather_rows_cuda(const GatherParams& params, void* stream) {
    if (check_for_device(params) != nullptr) return static_cast<int>(cudaErrorInvalidValue);
    if (params.n_rows == 0 || params.n_cols == 0) return static_cast<int>(cudaSuccess);
    const dim3 block = block_for(rows_are_runs(params) ? row_bytes(params) / kWidestAccess : params.n_cols);
    actcache_gather_rows<<<grid_for(params.n_rows, block), block, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace actcache
