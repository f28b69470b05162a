// Row gather on CUDA that splits bf16 words into planes on the way:  nvcc -ptx -arch=sm_80 planes_cuda.cu
//
//   runs      where the row of words and both rows of bytes lie on 16, a thread reads two 16-byte registers of words
//             (32 bytes in a line) and writes one of exponents and one of rests; then the tail word by word.
//   others    word by word.
//
// Both planes may be page-locked host memory: the host then has the exponents that its codec works on by themselves,
// without a pass of its own.
#include "planes.h"
#include "row_kernel.cuh"

namespace actcache {
namespace {

constexpr std::int64_t kWordsPerStep = 16;

// Splits as many whole steps as a run holds; returns the words split.
__device__ __forceinline__ std::int64_t split_steps(const unsigned char* __restrict__ from,
                                                    unsigned char* __restrict__ exponents,
                                                    unsigned char* __restrict__ rests, std::int64_t n_cols) {
    const auto* words = reinterpret_cast<const uint4*>(from);
    const std::int64_t n_steps = n_cols / kWordsPerStep;
    for (std::int64_t s = threadIdx.x; s < n_steps; s += blockDim.x) {
        const uint4 a = words[2 * s];
        const uint4 b = words[2 * s + 1];
        reinterpret_cast<uint4*>(exponents)[s] =
            make_uint4(exponents_of(a.x, a.y), exponents_of(a.z, a.w), exponents_of(b.x, b.y), exponents_of(b.z, b.w));
        reinterpret_cast<uint4*>(rests)[s] =
            make_uint4(rests_of(a.x, a.y), rests_of(a.z, a.w), rests_of(b.x, b.y), rests_of(b.z, b.w));
    }
    return n_steps * kWordsPerStep;
}

}  // namespace

// A plain name, so that it can be found in the PTX.
extern "C" __global__ void __launch_bounds__(kThreads) actcache_gather_planes(const PlanesParams p) {
    for (std::int64_t i = first_row(); i < p.gather.n_rows; i += rows_per_step()) {
        const unsigned char* from = source_row(p.gather, i);
        unsigned char* exponents = exponent_row(p, i);
        unsigned char* rests = rest_row(p, i);
        const bool wide = rows_are_runs(p.gather) && access_bytes(from, exponents) == kWidestAccess &&
                          access_bytes(from, rests) == kWidestAccess;
        const std::int64_t done = wide ? split_steps(from, exponents, rests, p.gather.n_cols) : 0;
        for (std::int64_t c = done + threadIdx.x; c < p.gather.n_cols; c += blockDim.x) {
            const std::uint16_t word = *reinterpret_cast<const std::uint16_t*>(from + c * p.gather.col_stride);
            exponents[c] = exponent_of(word);
            rests[c] = rest_of(word);
        }
    }
}

int gather_planes_cuda(const PlanesParams& params, void* stream) {
    if (check_for_device(params) != nullptr) return static_cast<int>(cudaErrorInvalidValue);
    const GatherParams& p = params.gather;
    if (p.n_rows == 0 || p.n_cols == 0) return static_cast<int>(cudaSuccess);
    const dim3 block = block_for(rows_are_runs(p) ? p.n_cols / kWordsPerStep : p.n_cols);
    actcache_gather_planes<<<grid_for(p.n_rows, block), block, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return static_cast<int>(cudaGetLastError());
}

}  // namespace actcache
