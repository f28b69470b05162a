// What the kernels that move rows share.
//
// A block is a rectangle of threads: x runs along a row, so that neighbouring threads touch neighbouring addresses on
// both sides; y counts rows, so that short rows fill a block too. Blocks stride over the rows.
#pragma once

#include <cuda_runtime.h>

#include "gather.h"

namespace actcache {

constexpr unsigned kThreads = 128;
constexpr std::int64_t kMaxBlocks = 1 << 16;  // far beyond what is resident at once; the stride loop does the rest

// For rows of so many accesses a thread can make.
inline dim3 block_for(std::int64_t accesses) {
    dim3 block(1);
    while (block.x < kThreads && block.x < accesses) block.x *= 2;
    block.y = kThreads / block.x;
    return block;
}

inline unsigned grid_for(std::int64_t n_rows, const dim3& block) {
    const std::int64_t n_blocks = (n_rows + block.y - 1) / block.y;
    return static_cast<unsigned>(n_blocks < kMaxBlocks ? n_blocks : kMaxBlocks);
}

__device__ __forceinline__ std::int64_t first_row() {
    return static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

__device__ __forceinline__ std::int64_t rows_per_step() { return static_cast<std::int64_t>(gridDim.x) * blockDim.y; }

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

// A run in the widest access that both rows are aligned for. A row of a residual stream is some thousands of bytes: 128
// threads move 2 KiB a step.
__device__ __forceinline__ std::int64_t copy_run(const unsigned char* from, unsigned char* to, std::int64_t n_bytes) {
    switch (access_bytes(from, to)) {
        case 16: return copy_words<uint4>(from, to, n_bytes);
        case 8: return copy_words<uint2>(from, to, n_bytes);
        case 4: return copy_words<std::uint32_t>(from, to, n_bytes);
        case 2: return copy_words<std::uint16_t>(from, to, n_bytes);
        default: return copy_words<std::uint8_t>(from, to, n_bytes);
    }
}

// The elements of a row from the first of them on.
template <typename Element>
__device__ __forceinline__ void copy_elements(const unsigned char* from, std::int64_t from_stride, unsigned char* to,
                                              std::int64_t to_stride, std::int64_t first, std::int64_t n_cols) {
    for (std::int64_t c = first + threadIdx.x; c < n_cols; c += blockDim.x) {
        *reinterpret_cast<Element*>(to + c * to_stride) = *reinterpret_cast<const Element*>(from + c * from_stride);
    }
}

// One row by the threads of one y: a run in wide accesses and a tail by elements, anything strided by elements.
__device__ __forceinline__ void copy_row(const unsigned char* from, std::int64_t from_stride, unsigned char* to,
                                         std::int64_t to_stride, std::int64_t n_cols, std::int64_t elem_bytes) {
    const bool run = from_stride == elem_bytes && to_stride == elem_bytes;
    const std::int64_t done = run ? copy_run(from, to, n_cols * elem_bytes) : 0;
    switch (elem_bytes) {
        case 1: return copy_elements<std::uint8_t>(from, from_stride, to, to_stride, done, n_cols);
        case 2: return copy_elements<std::uint16_t>(from, from_stride, to, to_stride, done / 2, n_cols);
        case 4: return copy_elements<std::uint32_t>(from, from_stride, to, to_stride, done / 4, n_cols);
        default: return copy_elements<std::uint64_t>(from, from_stride, to, to_stride, done / 8, n_cols);
    }
}

}  // namespace actcache
