// bf16 planes: a word s eeeeeeee mmmmmmm becomes an exponent byte and a *rest* byte s mmmmmmm, and back.
//
// Split and merge are pure bit moves, inline here and callable on host and device, so that the CPU loops and the CUDA
// kernel cannot disagree. The codec of the planes (PLANES.md is its specification) runs on the CPU only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gather.h"

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as the machine holds them");
#endif

namespace actcache {

ACTCACHE_INLINE std::uint8_t exponent_of(std::uint16_t word) { return static_cast<std::uint8_t>(word >> 7 & 0xff); }

ACTCACHE_INLINE std::uint8_t rest_of(std::uint16_t word) {
    return static_cast<std::uint8_t>((word >> 8 & 0x80) | (word & 0x7f));
}

ACTCACHE_INLINE std::uint16_t word_of(std::uint8_t exponent, std::uint8_t rest) {
    return static_cast<std::uint16_t>((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
}

// Four bytes from two registers that each hold one byte in the low half of either 16 bits.
ACTCACHE_INLINE std::uint32_t narrow(std::uint32_t low, std::uint32_t high) {
    return ((low | low >> 8) & 0xffffu) | (high | high >> 8) << 16;
}

// Exponents and rests of four words at once, two words in a register, as memory holds them (little endian).
ACTCACHE_INLINE std::uint32_t exponents_of(std::uint32_t low, std::uint32_t high) {
    return narrow(low >> 7 & 0x00ff00ffu, high >> 7 & 0x00ff00ffu);
}

ACTCACHE_INLINE std::uint32_t rests_of(std::uint32_t low, std::uint32_t high) {
    return narrow((low >> 8 & 0x00800080u) | (low & 0x007f007fu), (high >> 8 & 0x00800080u) | (high & 0x007f007fu));
}

// Gather and split in one pass: exponents[i, :] and rests[i, :] of src[row_ids[i], :].
struct PlanesParams {
    GatherParams gather;   // elem_bytes 2; its dst is the plane of exponents, uint8 [n_rows, n_cols]
    unsigned char* rests;  // uint8 [n_rows, n_cols], contiguous, apart from everything else
};
static_assert(sizeof(PlanesParams) == 80, "no padding: one layout for host, device and whoever packs it by hand");

ACTCACHE_INLINE unsigned char* exponent_row(const PlanesParams& p, std::int64_t i) {
    return p.gather.dst + i * p.gather.n_cols;
}

ACTCACHE_INLINE unsigned char* rest_row(const PlanesParams& p, std::int64_t i) { return p.rests + i * p.gather.n_cols; }

// Why the parameters cannot be served, or nullptr. Looks at no row id.
inline const char* check(const PlanesParams& p) {
    if (p.gather.elem_bytes != 2) return "elem_bytes must be 2";
    if (const char* refusal = check(p.gather)) return refusal;
    const bool some = p.gather.n_rows > 0 && p.gather.n_cols > 0;
    return some && p.rests == nullptr ? "src and dst must not be null" : nullptr;
}

inline const char* check_for_device(const PlanesParams& p) {
    if (const char* refusal = check(p)) return refusal;
    const bool aligned = reinterpret_cast<std::uintptr_t>(p.gather.src) % 2 == 0 && p.gather.row_stride % 2 == 0 &&
                         p.gather.col_stride % 2 == 0;
    return aligned ? nullptr : "src and strides must be multiples of elem_bytes";
}

// planes_cpu.cpp. `words` need no alignment.
void split_words(const unsigned char* words, std::size_t n, std::uint8_t* exponents, std::uint8_t* rests);
void merge_words(const std::uint8_t* exponents, const std::uint8_t* rests, std::size_t n, unsigned char* words);

// planes_cpu.cpp. Parameters must have passed check(), ids first_bad_id().
void gather_planes_cpu(const PlanesParams& params, int n_threads);

// planes_cuda.cu. As gather_rows_cuda; both planes are device memory or page-locked host memory.
int gather_planes_cuda(const PlanesParams& params, void* stream);

// The codec: codec.cpp. A chunk is its header and, after it, the sections that PLANES.md lists.
constexpr std::size_t kHeaderBytes = 40;

// What encode() takes: words, or planes that a gather has split already (then `words` is null).
struct PlanesInput {
    const unsigned char* words;     // [n] of 2 bytes, or null
    const std::uint8_t* exponents;  // [n], read where words is null
    const std::uint8_t* rests;      // [n], read where words is null
    std::size_t n;
    std::size_t row_words;  // width of a row, 1 or more: words so far apart share a base
};

// The most bytes that encode() writes for n words.
constexpr std::size_t encoded_bound(std::size_t n) { return kHeaderBytes + 2 * n; }

// Writes at most encoded_bound(input.n) bytes to `out` and returns how many.
std::size_t encode_planes(const PlanesInput& input, unsigned char* out);

// Writes `n` words to `words`, or returns why `data` is no chunk of n words; nothing is written then. Never reads
// outside `data`, and needs less memory of its own than 2 * size.
const char* decode_planes(const unsigned char* data, std::size_t size, std::size_t n, unsigned char* words);

}  // namespace actcache
