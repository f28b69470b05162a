// Row gather: out[i, :] = src[row_ids[i], :], for elements of 1, 2, 4 or 8 bytes and a source of any strides.
//
// Everything that decides *which byte goes where* is here, inline and callable on host and device, so that the CPU loop
// and the CUDA kernel cannot disagree: they only add how the work is dealt out.
//
//   source element (r, c)        lies at  src + r * row_stride + c * col_stride      (strides in bytes, any sign)
//   destination element (i, c)   lies at  dst + i * row_bytes  + c * elem_bytes,     row_bytes = n_cols * elem_bytes
//
// Where col_stride == elem_bytes a row is one run of row_bytes bytes, and only then can wider accesses be used. A run
// is copied as `vectors` words of 16 bytes followed by a tail of elements; vectors is zero unless both the source row
// and the destination row begin on a 16-byte address. Which of the rows do is decided row by row: with an odd row_bytes
// every destination row has another alignment.
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
    unsigned char* dst;           // [n_rows, n_cols], contiguous
    std::int64_t n_src_rows;
    std::int64_t n_rows;
    std::int64_t n_cols;
    std::int64_t row_stride;  // bytes
    std::int64_t col_stride;  // bytes
    std::int64_t elem_bytes;  // 1, 2, 4 or 8
};

constexpr std::int64_t kVectorBytes = 16;

ACTCACHE_INLINE std::int64_t row_bytes(const GatherParams& p) { return p.n_cols * p.elem_bytes; }

ACTCACHE_INLINE bool rows_are_runs(const GatherParams& p) { return p.col_stride == p.elem_bytes; }

ACTCACHE_INLINE const unsigned char* source_row(const GatherParams& p, std::int64_t i) {
    return p.src + p.row_ids[i] * p.row_stride;
}

ACTCACHE_INLINE unsigned char* destination_row(const GatherParams& p, std::int64_t i) {
    return p.dst + i * row_bytes(p);
}

// How many 16-byte words at the front of the run can be copied whole.
ACTCACHE_INLINE std::int64_t vectors_in_run(const GatherParams& p, const unsigned char* from, const unsigned char* to) {
    const auto misaligned = (reinterpret_cast<std::uintptr_t>(from) | reinterpret_cast<std::uintptr_t>(to)) %
                            static_cast<std::uintptr_t>(kVectorBytes);
    return misaligned == 0 ? row_bytes(p) / kVectorBytes : 0;
}

// Element c of a row, as one access of its own size. torch and NumPy keep elements on multiples of their size.
template <typename Word>
ACTCACHE_INLINE void copy_element(const GatherParams& p, const unsigned char* from, unsigned char* to, std::int64_t c) {
    *reinterpret_cast<Word*>(to + c * static_cast<std::int64_t>(sizeof(Word))) =
        *reinterpret_cast<const Word*>(from + c * p.col_stride);
}

// The largest n_rows * row_bytes that is taken: beyond it a byte offset could leave 63 bits.
constexpr std::int64_t kMaxBytes = std::int64_t{1} << 62;

enum class ParamError { none, elem_bytes, negative, too_large, pointer, alignment };

// Checks that need no look at the row ids.
inline ParamError check(const GatherParams& p) {
    if (p.elem_bytes != 1 && p.elem_bytes != 2 && p.elem_bytes != 4 && p.elem_bytes != 8) return ParamError::elem_bytes;
    if (p.n_src_rows < 0 || p.n_rows < 0 || p.n_cols < 0) return ParamError::negative;
    if (p.n_cols > 0 && p.n_rows > kMaxBytes / p.elem_bytes / p.n_cols) return ParamError::too_large;
    if (p.n_rows > 0 && p.n_cols > 0) {
        if (p.src == nullptr || p.dst == nullptr || p.row_ids == nullptr) return ParamError::pointer;
        const auto size = static_cast<std::uintptr_t>(p.elem_bytes);
        if (reinterpret_cast<std::uintptr_t>(p.src) % size != 0 ||
            reinterpret_cast<std::uintptr_t>(p.dst) % size != 0 || p.row_stride % p.elem_bytes != 0 ||
            p.col_stride % p.elem_bytes != 0) {
            return ParamError::alignment;
        }
    }
    return ParamError::none;
}

inline const char* describe(ParamError error) {
    switch (error) {
        case ParamError::none: return "no error";
        case ParamError::elem_bytes: return "elements must be 1, 2, 4 or 8 bytes";
        case ParamError::negative: return "a count is negative";
        case ParamError::too_large: return "the result would exceed 2^62 bytes";
        case ParamError::pointer: return "a pointer is null";
        case ParamError::alignment: return "an address or stride is not a multiple of the element size";
    }
    return "unknown error";
}

// The first index whose row id is outside 0..n_src_rows-1, or n_rows when all are inside.
inline std::int64_t first_bad_id(const GatherParams& p) {
    for (std::int64_t i = 0; i < p.n_rows; ++i) {
        if (p.row_ids[i] < 0 || p.row_ids[i] >= p.n_src_rows) return i;
    }
    return p.n_rows;
}

// gather_cpu.cpp. Parameters must have passed check(), ids first_bad_id().
void gather_rows_cpu(const GatherParams& params, int n_threads);

// gather_cuda.cu. Queues the copy on `stream` and returns; 0, or the CUDA error code of the launch. Does not allocate
// and does not synchronise. Row ids are device memory here and must have been checked on the host; dst may be device
// memory or page-locked host memory.
int gather_rows_cuda(const GatherParams& params, void* stream);

}  // namespace actcache
