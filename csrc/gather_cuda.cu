// Row gather on CUDA:  nvcc -ptx -arch=sm_80 gather_cuda.cu
//
// One block copies one row at a time (grid-stride over rows), its threads side by side along the row, so that
// neighbouring threads touch neighbouring addresses on both sides.
//
//   runs     16-byte words while both rows are 16-byte aligned, then single elements. A row of a residual stream is
//   some
//            thousands of bytes: 128 threads move 2 KiB a step.
//   strided  single elements.
//
// The destination may be page-locked host memory: the writes then cross the bus as whole 16-byte words, and no copy
// through device memory is needed.
#include <cuda_runtime.h>

#include "gather.h"

namespace actcache {

template <typename Word>
__device__ __forceinline__ void gather(const GatherParams& p) {
    const bool runs = rows_are_runs(p);
    for (std::int64_t i = blockIdx.x; i < p.n_rows; i += gridDim.x) {
        const unsigned char* from = source_row(p, i);
        unsigned char* to = destination_row(p, i);
        const std::int64_t n_vectors = runs ? vectors_in_run(p, from, to) : 0;
        const auto* from16 = reinterpret_cast<const uint4*>(from);
        auto* to16 = reinterpret_cast<uint4*>(to);
        for (std::int64_t v = threadIdx.x; v < n_vectors; v += blockDim.x) to16[v] = from16[v];
        const std::int64_t first = n_vectors * (kVectorBytes / static_cast<std::int64_t>(sizeof(Word)));
        for (std::int64_t c = first + threadIdx.x; c < p.n_cols; c += blockDim.x) copy_element<Word>(p, from, to, c);
    }
}

// One entry a word size; plain names, so that they can be found in the PTX.
extern "C" __global__ void actcache_gather_rows_1(GatherParams p) { gather<std::uint8_t>(p); }
extern "C" __global__ void actcache_gather_rows_2(GatherParams p) { gather<std::uint16_t>(p); }
extern "C" __global__ void actcache_gather_rows_4(GatherParams p) { gather<std::uint32_t>(p); }
extern "C" __global__ void actcache_gather_rows_8(GatherParams p) { gather<std::uint64_t>(p); }

int gather_rows_cuda(const GatherParams& params, void* stream) {
    if (params.n_rows == 0 || params.n_cols == 0) return cudaSuccess;
    constexpr unsigned kThreads = 128;
    constexpr std::int64_t kMaxBlocks = 1 << 16;  // far beyond what is resident at once; the stride loop does the rest
    const auto blocks = static_cast<unsigned>(params.n_rows < kMaxBlocks ? params.n_rows : kMaxBlocks);
    const auto queue = static_cast<cudaStream_t>(stream);
    switch (params.elem_bytes) {
        case 1: actcache_gather_rows_1<<<blocks, kThreads, 0, queue>>>(params); break;
        case 2: actcache_gather_rows_2<<<blocks, kThreads, 0, queue>>>(params); break;
        case 4: actcache_gather_rows_4<<<blocks, kThreads, 0, queue>>>(params); break;
        default: actcache_gather_rows_8<<<blocks, kThreads, 0, queue>>>(params); break;
    }
    return static_cast<int>(cudaGetLastError());
}

}  // namespace actcache
