// One row from one place to another on the CPU: a run by memcpy, anything else element by element.
#pragma once

#include <cstdint>
#include <cstring>

namespace actcache {

template <std::size_t kBytes>
void copy_elements(const unsigned char* from, std::int64_t from_stride, unsigned char* to, std::int64_t to_stride,
                   std::int64_t n) {
    for (std::int64_t c = 0; c < n; ++c, from += from_stride, to += to_stride) std::memcpy(to, from, kBytes);
}

// Strides in bytes; elem_bytes is 1, 2, 4 or 8.
inline void copy_row(const unsigned char* from, std::int64_t from_stride, unsigned char* to, std::int64_t to_stride,
                     std::int64_t n, std::int64_t elem_bytes) {
    if (from_stride == elem_bytes && to_stride == elem_bytes) {
        std::memcpy(to, from, static_cast<std::size_t>(n * elem_bytes));
        return;
    }
    switch (elem_bytes) {
        case 1: return copy_elements<1>(from, from_stride, to, to_stride, n);
        case 2: return copy_elements<2>(from, from_stride, to, to_stride, n);
        case 4: return copy_elements<4>(from, from_stride, to, to_stride, n);
        default: return copy_elements<8>(from, from_stride, to, to_stride, n);
    }
}

}  // namespace actcache
