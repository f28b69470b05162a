// bf16 planes: a word s eeeeeeee mmmmmmm becomes an exponent byte and a *rest* byte s mmmmmmm, and back. The codec of
// the planes, whose specification is PLANES.md.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__BYTE_ORDER__)
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as the machine holds them");
#endif

namespace actcache {

inline std::uint8_t exponent_of(std::uint16_t word) { return static_cast<std::uint8_t>(word >> 7 & 0xff); }

inline std::uint8_t rest_of(std::uint16_t word) {
    return static_cast<std::uint8_t>((word >> 8 & 0x80) | (word & 0x7f));
}

inline std::uint16_t word_of(std::uint8_t exponent, std::uint8_t rest) {
    return static_cast<std::uint16_t>((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
}

// planes_cpu.cpp. `words` need no alignment.
void split_words(const unsigned char* words, std::size_t n, std::uint8_t* exponents, std::uint8_t* rests);
void merge_words(const std::uint8_t* exponents, const std::uint8_t* rests, std::size_t n, unsigned char* words);

// The codec: codec.cpp. A chunk is its header and, after it, the sections that PLANES.md lists.
constexpr std::size_t kHeaderBytes = 40;

// The most bytes that encode_words() writes for n words.
constexpr std::size_t encoded_bound(std::size_t n) { return kHeaderBytes + 2 * n; }

// Writes a chunk of `n` words to `out`, at most encoded_bound(n) bytes, and returns how many. `words` need no alignment.
// `row_words`, 1 or more, is the width of a row: words so far apart share a base.
std::size_t encode_words(const unsigned char* words, std::size_t n, std::size_t row_words, unsigned char* out);

// Writes `n` words to `words`, or returns why `data` is no chunk of n words; nothing is written then. Never reads
// outside `data`, and needs less memory of its own than 2 * size.
const char* decode_words(const unsigned char* data, std::size_t size, std::size_t n, unsigned char* words);

}  // namespace actcache
