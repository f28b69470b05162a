// Row gather: out[i, :] = src[row_ids[i], :], for elements of 1, 2, 4 or 8 bytes and a source of any strides.
//
// Everything that decides *which byte goes where* is here, inline and callable on host and device, so that the CPU loop
// and the CUDA kernel cannot disagree: they only add how the work is dealt out.
//
//   source element (r, c)        lies at  src + r * row_stride + c * col_stride      (strides in bytes, any sign or zero)
//   destination element (i, c)   lies at  dst + i * row_bytes  + c * elem_bytes,     row_bytes = n_cols * elem_bytes
//
// Where col_stride == elem_bytes a row is one *run* of row_bytes bytes, and accesses wider than an element are possible.
// An access of w bytes needs both addresses on a multiple of w, so w is decided row by row: when row_bytes is no
// multiple of 16, neighbouring destination rows are aligned differently. The largest w is the lowest bit set in either
// address, at most 16, and never less than an element, since elements lie on multiples of their own size. A run is then
// row_bytes / w accesses of w bytes and a tail shorter than w, copied element by element.
//
// Why 64-bit arithmetic cannot overflow: ids lie in 0..n_src_rows-1 and check() bounds the three products that addresses
// are made of, (n_src_rows - 1) * |row_stride|, (n_cols - 1) * |col_stride| and n_rows * row_bytes, by kMaxBytes.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define ACTCACHE_INLINE __host__ __device__ __forceinline__
#else
#define ACTCACHE_INLINE inline
#endif

namespace actcache {

// A kernel's only view of the world. Plain values: passed to the device as it is.
struct GatherParams {
    const unsigned char* src;
    const std::int64_t* row_ids;  // [n_rows], each in 0..n_src_rows-1
    unsigned char* dst;           // [n_rows, n_cols], contiguous, apart from src and row_ids
    std::int64_t n_src_rows;
    std::int64_t n_rows;
    std::int64_t n_cols;
    std::int64_t row_stride;  // bytes
    std::int64_t col_stride;  // bytes
    std::int64_t elem_bytes;  // 1, 2, 4 or 8
};
static_assert(sizeof(GatherParams) == 72, "no padding: one layout for host, device and whoever packs it by hand");

constexpr std::int64_t kWidestAccess = 16;

// More than any address space holds (57 bits), and far enough below 2^63 that sums of two such offsets fit.
constexpr std::int64_t kMaxBytes = std::int64_t{1} << 60;

ACTCACHE_INLINE std::int64_t row_bytes(const GatherParams& p) { return p.n_cols * p.elem_bytes; }

ACTCACHE_INLINE bool rows_are_runs(const GatherParams& p) { return p.col_stride == p.elem_bytes; }

ACTCACHE_INLINE const unsigned char* source_row(const GatherParams& p, std::int64_t i) {
    return p.src + p.row_ids[i] * p.row_stride;
}

ACTCACHE_INLINE unsigned char* destination_row(const GatherParams& p, std::int64_t i) {
    return p.dst + i * row_bytes(p);
}

// The widest access, in bytes, that both addresses are aligned for: 16, 8, 4, 2 or 1.
ACTCACHE_INLINE std::int64_t access_bytes(const unsigned char* from, const unsigned char* to) {
    const std::uintptr_t bits = reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to) |
                                static_cast<std::uintptr_t>(kWidestAccess);
    return static_cast<std::int64_t>(bits & (~bits + 1));
}

// Whether the product of two counts or sizes stays within kMaxBytes, found without computing it.
inline bool product_fits(std::uint64_t a, std::uint64_t b) {
    return b == 0 || a <= static_cast<std::uint64_t>(kMaxBytes) / b;
}

// Why the parameters cannot be served, or nullptr. Looks at no row id.
inline const char* check(const GatherParams& p) {
    const auto magnitude = [](std::int64_t x) {
        return x < 0 ? std::uint64_t{0} - static_cast<std::uint64_t>(x) : static_cast<std::uint64_t>(x);
    };
    const auto steps = [](std::int64_t count) { return static_cast<std::uint64_t>(count > 0 ? count - 1 : 0); };
    if (p.elem_bytes != 1 && p.elem_bytes != 2 && p.elem_bytes != 4 && p.elem_bytes != 8) {
        return "elem_bytes must be 1, 2, 4 or 8";
    }
    if (p.n_src_rows < 0 || p.n_rows < 0 || p.n_cols < 0) return "counts must not be negative";
    if (!product_fits(magnitude(p.n_cols), magnitude(p.elem_bytes)) ||
        !product_fits(magnitude(p.n_rows), magnitude(row_bytes(p)))) {
        return "the result must not exceed 2^60 bytes";
    }
    if (!product_fits(steps(p.n_src_rows), magnitude(p.row_stride)) ||
        !product_fits(steps(p.n_cols), magnitude(p.col_stride))) {
        return "the source must not span more than 2^60 bytes";
    }
    if (p.n_rows > 0 && p.row_ids == nullptr) return "row_ids must not be null";
    if (p.n_rows > 0 && p.n_cols > 0 && (p.src == nullptr || p.dst == nullptr)) return "src and dst must not be null";
    return nullptr;
}

// The same for the kernel, whose accesses fault unless every element lies on a multiple of its size. (The CPU copies
// such elements too.)
inline const char* check_for_device(const GatherParams& p) {
    if (const char* refusal = check(p)) return refusal;
    const auto size = static_cast<std::uintptr_t>(p.elem_bytes);
    const bool aligned = reinterpret_cast<std::uintptr_t>(p.src) % size == 0 &&
                         reinterpret_cast<std::uintptr_t>(p.dst) % size == 0 && p.row_stride % p.elem_bytes == 0 &&
                         p.col_stride % p.elem_bytes == 0;
    return aligned ? nullptr : "src, dst and strides must be multiples of elem_bytes";
}

// The first index whose row id is outside 0..n_src_rows-1, or n_rows when all are inside.
inline std::int64_t first_bad_id(const GatherParams& p) {
    for (std::int64_t i = 0; i < p.n_rows; ++i) {
        if (p.row_ids[i] < 0 || p.row_ids[i] >= p.n_src_rows) return i;
    }
    return p.n_rows;
}

// gather_cpu.cpp. Parameters must have passed check(), ids first_bad_id(). Uses up to n_threads threads, fewer where
// there is little to copy.
void gather_rows_cpu(const GatherParams& params, int n_threads);

// gather_cuda.cu. Queues the copy on `stream` (a cudaStream_t) and returns 0, or the CUDA error code of the launch.
// Does not allocate and does not synchronise. Row ids are device memory here, which no host code can look at: they must
// have been checked before they were copied there. dst is device memory or page-locked host memory.
int gather_rows_cuda(const GatherParams& params, void* stream);

}  // namespace actcache
