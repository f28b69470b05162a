// Split and merge of bf16 planes on the CPU.
#include <cstring>

#include "isa.h"
#include "planes.h"

namespace actcache {
namespace {

ACTCACHE_BODY std::uint16_t load_word(const unsigned char* from) {
    std::uint16_t word;
    std::memcpy(&word, from, sizeof word);
    return word;
}

// Left to the compiler, which turns either loop into shifts, masks and packs over whole registers.
ACTCACHE_BODY void split_body(const unsigned char* words, std::size_t n, std::uint8_t* __restrict__ exponents,
                              std::uint8_t* __restrict__ rests) {
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint16_t word = load_word(words + 2 * i);
        exponents[i] = exponent_of(word);
        rests[i] = rest_of(word);
    }
}

ACTCACHE_BODY void merge_body(const std::uint8_t* exponents, const std::uint8_t* rests, std::size_t n,
                              unsigned char* __restrict__ words) {
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint16_t word = word_of(exponents[i], rests[i]);
        std::memcpy(words + 2 * i, &word, sizeof word);
    }
}

#if defined(ACTCACHE_X86)

ACTCACHE_AVX2 void split_avx2(const unsigned char* words, std::size_t n, std::uint8_t* exponents, std::uint8_t* rests) {
    split_body(words, n, exponents, rests);
}

ACTCACHE_AVX2 void merge_avx2(const std::uint8_t* exponents, const std::uint8_t* rests, std::size_t n,
                              unsigned char* words) {
    merge_body(exponents, rests, n, words);
}

ACTCACHE_AVX512 void split_avx512(const unsigned char* words, std::size_t n, std::uint8_t* exponents,
                                  std::uint8_t* rests) {
    split_body(words, n, exponents, rests);
}

ACTCACHE_AVX512 void merge_avx512(const std::uint8_t* exponents, const std::uint8_t* rests, std::size_t n,
                                  unsigned char* words) {
    merge_body(exponents, rests, n, words);
}

#endif

}  // namespace

void split_words(const unsigned char* words, std::size_t n, std::uint8_t* exponents, std::uint8_t* rests) {
#if defined(ACTCACHE_X86)
    if (isa() == Isa::kAvx512) return split_avx512(words, n, exponents, rests);
    if (isa() == Isa::kAvx2) return split_avx2(words, n, exponents, rests);
#endif
    split_body(words, n, exponents, rests);
}

void merge_words(const std::uint8_t* exponents, const std::uint8_t* rests, std::size_t n, unsigned char* words) {
#if defined(ACTCACHE_X86)
    if (isa() == Isa::kAvx512) return merge_avx512(exponents, rests, n, words);
    if (isa() == Isa::kAvx2) return merge_avx2(exponents, rests, n, words);
#endif
    merge_body(exponents, rests, n, words);
}

}  // namespace actcache
