// Row gather on CUDA:  nvcc -ptx -arch=sm_80 gather_cuda.cu
//
// A block is a rectangle of threads: x runs along a row, so that neighbouring threads touch neighbouring addresses on
// both sides; y counts rows, so that short rows fill a block too. Blocks stride over the rows.
//
//   runs      the widest access that both rows are aligned for, then the tail by elements. A row of a residual stream
//             is some thousands of bytes: 128 threads move 2 KiB a step.
//   strided   by elements.
//
// The destination may be page-locked host memory: the writes cross the bus as they are made, and no copy through device
// memory is needed.
#include <cuda_runtime.h>

#include "gather.h"

namespace actcache {
namespace {

constexpr unsigned kThreads = 128;
constexpr std::int64_t kMaxBlocks = 1 << 16;  // far beyond what is resident at once; the stride loop does the rest

// Copies as many whole words as a run holds; returns the bytes copied.
template <typename Word>
__device__ __forceinline__ std::int64_t copy_words(const unsigned char* __restrict__ from,
                                                   unsigned char* __restrict__ to, std::int64_t n_bytes) {
    constexpr auto size = static_cast<std::int64_t>(sizeof(Word));
    const auto* source = reinterpret_cast<const Word*>(from);
    auto* target = reinterpret_cast<Word*>(to);
    const std::int64_t n_words = n_bytes / size;
    for (std::int64_t w = threadIdx.x; w < n_words; w += blockDim.x) target[w] = source[w];
    return n_words * size;
}

__device__ __forceinline__ std::int64_t copy_run(const GatherParams& p, const unsigned char* from, unsigned char* to) {
    const std::int64_t n_bytes = row_bytes(p);
    switch (access_bytes(from, to)) {
        case 16: return copy_words<uint4>(from, to, n_bytes);
        case 8: return copy_words<uint2>(from, to, n_bytes);
        case 4: return copy_words<std::uint32_t>(from, to, n_bytes);
        case 2: return copy_words<std::uint16_t>(from, to, n_bytes);
        default: return copy_words<std::uint8_t>(from, to, n_bytes);
    }
}

// The elements from byte `done` of the destination row on.
template <typename Element>
__device__ __forceinline__ void copy_elements(const GatherParams& p, const unsigned char* from, unsigned char* to,
                                              std::int64_t done) {
    constexpr auto size = static_cast<std::int64_t>(sizeof(Element));
    for (std::int64_t c = done / size + threadIdx.x; c < p.n_cols; c += blockDim.x) {
        *reinterpret_cast<Element*>(to + c * size) = *reinterpret_cast<const Element*>(from + c * p.col_stride);
    }
}

}  // namespace

// A plain name, so that it can be found in the PTX.
extern "C" __global__ void __launch_bounds__(kThreads) actcache_gather_rows(const GatherParams p) {
    const std::int64_t rows_per_step = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < p.n_rows;
         i += rows_per_step) {
        const unsigned char* from = source_row(p, i);
        unsigned char* to = destination_row(p, i);
        const std::int64_t done = rows_are_runs(p) ? copy_run(p, from, to) : 0;
        switch (p.elem_bytes) {
            case 1: copy_elements<std::uint8_t>(p, from, to, done); break;
            case 2: copy_elements<std::uint16_t>(p, from, to, done); break;
            case 4: copy_elements<std::uint32_t>(p, from, to, done); break;
            default: copy_elements<std::uint64_t>(p, from, to, done); break;
        }
    }
}

int gather_rows_cuda(const GatherParams& params, void* stream) {
    if (check_for_device(params) != nullptr) return static_cast<int>(cudaErrorInvalidValue);
    if (params.n_rows == 0 || params.n_cols == 0) return static_cast<int>(cudaSuccess);
    const std::int64_t accesses = rows_are_runs(params) ? row_bytes(params) / kWidestAccess : params.n_cols;
    dim3 block(1);
    while (block.x < kThreads && block.x < accesses) block.x *= 2;
    block.y = kThreads / block.x;
    const std::int64_t n_blocks = (params.n_rows + block.y - 1) / block.y;
    const auto grid = static_cast<unsigned>(n_blocks < kMaxBlocks ? n_blocks : kMaxBlocks);
    actcache_gather_rows<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace actcache
