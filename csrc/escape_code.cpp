// The escape code in portable C++, which takes any length, and in AVX2 and AVX-512, which take blocks of 64 and leave
// the rest to it.
#include "escape_code.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "isa.h"

#if defined(ACTCACHE_X86)
#include <immintrin.h>
#endif

namespace actcache {
namespace {

constexpr std::size_t kBlock = 64;

std::size_t rank_portable(const std::uint8_t* exponents, const std::uint8_t* base, std::size_t n,
                          const std::uint8_t* rank_of_symbol, std::uint8_t* ranks, std::uint8_t* outside) {
    std::size_t n_outside = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto offset = static_cast<std::uint8_t>(exponents[i] - base[i]);
        const std::uint8_t symbol = offset < kOutside ? offset : kOutside;
        ranks[i] = rank_of_symbol[symbol];
        outside[n_outside] = exponents[i];
        n_outside += symbol == kOutside;
    }
    return n_outside;
}

std::size_t unrank_portable(const std::uint8_t* ranks, const std::uint8_t* base, std::size_t n,
                            const std::uint8_t* symbol_of_rank, const std::uint8_t* outside, std::uint8_t* exponents) {
    std::size_t n_outside = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint8_t symbol = symbol_of_rank[ranks[i]];
        exponents[i] = symbol == kOutside ? outside[n_outside++] : static_cast<std::uint8_t>(base[i] + symbol);
    }
    return n_outside;
}

// No branch on a value: a third of them are escapes, in no order that a processor could guess.
std::size_t encode_portable(const std::uint8_t* values, std::size_t n, std::uint8_t* codes, std::uint8_t* next) {
    std::size_t n_next = 0;
    for (std::size_t i = 0; i < n; i += 4) {
        unsigned packed = 0;
        for (std::size_t k = 0; k < std::min<std::size_t>(4, n - i); ++k) {
            const std::uint8_t value = values[i + k];
            packed |= std::min(value, std::uint8_t{3}) << 2 * k;
            if (next == nullptr) continue;
            next[n_next] = static_cast<std::uint8_t>(value - 3);
            n_next += value >= 3;
        }
        codes[i / 4] = static_cast<std::uint8_t>(packed);
    }
    return n_next;
}

std::size_t decode_portable(const std::uint8_t* codes, std::size_t n, const std::uint8_t* next, std::uint8_t* values) {
    std::size_t n_next = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const unsigned code = codes[i / 4] >> 2 * (i % 4) & 3;
        values[i] = static_cast<std::uint8_t>(code);
        if (next == nullptr) continue;
        const unsigned escape = code == 3;
        values[i] = static_cast<std::uint8_t>(code + (next[n_next] & (0u - escape)));
        n_next += escape;
    }
    return n_next;
}

ACTCACHE_BODY std::size_t count_body(const std::uint8_t* codes, std::size_t n, unsigned code) {
    // Both bits of a code are set after the exclusive or if it is the one to count.
    const std::uint64_t flip = 0x5555555555555555u * (3 - code);
    std::size_t count = 0;
    std::size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        std::uint64_t word;
        std::memcpy(&word, codes + i / 4, sizeof word);
        word ^= flip;
        count += static_cast<std::size_t>(__builtin_popcountll(word & word >> 1 & 0x5555555555555555u));
    }
    for (; i < n; ++i) count += (codes[i / 4] >> 2 * (i % 4) & 3u) == code;
    return count;
}

std::size_t count_portable(const std::uint8_t* codes, std::size_t n, unsigned code) {
    return count_body(codes, n, code);
}

#if defined(ACTCACHE_X86)

ACTCACHE_AVX2 std::size_t count_popcnt(const std::uint8_t* codes, std::size_t n, unsigned code) {
    return count_body(codes, n, code);
}

// For each mask of eight bytes, the shuffle that moves the marked bytes to the front (and zeros behind them), and the
// one that moves them back (and zeros between them).
struct Shuffles {
    std::array<std::array<std::uint8_t, 8>, 256> compress{};
    std::array<std::array<std::uint8_t, 8>, 256> expand{};
};

constexpr Shuffles make_shuffles() {
    constexpr std::uint8_t kZero = 0x80;
    Shuffles made{};
    for (unsigned mask = 0; mask < 256; ++mask) {
        std::uint8_t count = 0;
        for (std::uint8_t bit = 0; bit < 8; ++bit) {
            const bool marked = (mask >> bit & 1) != 0;
            made.expand[mask][bit] = marked ? count : kZero;
            if (marked) made.compress[mask][count++] = bit;
        }
        for (; count < 8; ++count) made.compress[mask][count] = kZero;
    }
    return made;
}

alignas(64) constexpr Shuffles kShuffles = make_shuffles();

ACTCACHE_AVX2 inline __m256i load256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

ACTCACHE_AVX2 inline void store256(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }

ACTCACHE_AVX2 inline __m128i load64(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }

ACTCACHE_AVX2 inline void store64(void* to, __m128i value) { _mm_storel_epi64(static_cast<__m128i*>(to), value); }

ACTCACHE_AVX2 inline __m256i table256(const std::uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}

ACTCACHE_AVX2 inline std::size_t marked(__m256i bytes) {
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(bytes));
}

ACTCACHE_AVX2 std::size_t rank_avx2(const std::uint8_t* exponents, const std::uint8_t* base, std::size_t n,
                                    const std::uint8_t* rank_of_symbol, std::uint8_t* ranks, std::uint8_t* outside) {
    const __m256i table = table256(rank_of_symbol);
    const __m256i last = _mm256_set1_epi8(kOutside);
    std::size_t n_outside = 0;
    for (std::size_t i = 0; i < n; i += 32) {
        const __m256i symbols = _mm256_min_epu8(_mm256_sub_epi8(load256(exponents + i), load256(base + i)), last);
        store256(ranks + i, _mm256_shuffle_epi8(table, symbols));
        for (std::size_t mask = marked(_mm256_cmpeq_epi8(symbols, last)); mask != 0; mask &= mask - 1) {
            outside[n_outside++] = exponents[i + static_cast<std::size_t>(__builtin_ctzll(mask))];
        }
    }
    return n_outside;
}

ACTCACHE_AVX2 std::size_t unrank_avx2(const std::uint8_t* ranks, const std::uint8_t* base, std::size_t n,
                                      const std::uint8_t* symbol_of_rank, const std::uint8_t* outside,
                                      std::uint8_t* exponents) {
    const __m256i table = table256(symbol_of_rank);
    std::size_t n_outside = 0;
    for (std::size_t i = 0; i < n; i += 32) {
        const __m256i symbols = _mm256_shuffle_epi8(table, load256(ranks + i));
        store256(exponents + i, _mm256_add_epi8(load256(base + i), symbols));
        std::size_t mask = marked(_mm256_cmpeq_epi8(symbols, _mm256_set1_epi8(kOutside)));
        for (; mask != 0; mask &= mask - 1) {
            exponents[i + static_cast<std::size_t>(__builtin_ctzll(mask))] = outside[n_outside++];
        }
    }
    return n_outside;
}

ACTCACHE_AVX2 std::size_t encode_avx2(const std::uint8_t* values, std::size_t n, std::uint8_t* codes,
                                      std::uint8_t* next) {
    const __m256i three = _mm256_set1_epi8(3);
    // Each four codes to the lowest byte of their 32 bits, then those bytes to the front of their half.
    const __m256i pairs = _mm256_set1_epi16(0x0401);
    const __m256i quads = _mm256_set1_epi32(0x00100001);
    const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    std::size_t n_next = 0;
    for (std::size_t i = 0; i < n; i += 32) {
        const __m256i value = load256(values + i);
        const __m256i code = _mm256_min_epu8(value, three);
        const __m256i packed = _mm256_shuffle_epi8(_mm256_madd_epi16(_mm256_maddubs_epi16(code, pairs), quads), lowest);
        const int halves[2] = {_mm256_extract_epi32(packed, 0), _mm256_extract_epi32(packed, 4)};
        std::memcpy(codes + i / 4, halves, sizeof halves);
        if (next == nullptr) continue;
        std::uint8_t behind[32];
        store256(behind, _mm256_sub_epi8(value, three));
        const std::size_t escapes = marked(_mm256_cmpeq_epi8(code, three));
        for (std::size_t part = 0; part < 4; ++part) {
            const std::size_t mask = escapes >> 8 * part & 0xff;
            store64(next + n_next,
                    _mm_shuffle_epi8(load64(behind + 8 * part), load64(kShuffles.compress[mask].data())));
            n_next += static_cast<std::size_t>(__builtin_popcountll(mask));
        }
    }
    return n_next;
}

ACTCACHE_AVX2 std::size_t decode_avx2(const std::uint8_t* codes, std::size_t n, const std::uint8_t* next,
                                      std::uint8_t* values) {
    const __m256i three = _mm256_set1_epi8(3);
    std::size_t n_next = 0;
    for (std::size_t i = 0; i < n; i += 32) {
        const __m256i four = _mm256_cvtepu8_epi32(load64(codes + i / 4));
        const __m256i two = _mm256_or_si256(four, _mm256_slli_epi32(four, 12));
        const __m256i code = _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi32(two, 6)), three);
        if (next == nullptr) {
            store256(values + i, code);
            continue;
        }
        const std::size_t escapes = marked(_mm256_cmpeq_epi8(code, three));
        std::uint8_t behind[32];
        for (std::size_t part = 0; part < 4; ++part) {
            const std::size_t mask = escapes >> 8 * part & 0xff;
            store64(behind + 8 * part, _mm_shuffle_epi8(load64(next + n_next), load64(kShuffles.expand[mask].data())));
            n_next += static_cast<std::size_t>(__builtin_popcountll(mask));
        }
        store256(values + i, _mm256_add_epi8(code, load256(behind)));
    }
    return n_next;
}

// The plain forms of some intrinsics trip GCC 12's -Wuninitialized on its own headers (its bug 105593); the forms with
// a mask of ones are the same instructions.
constexpr __mmask16 kAll = 0xffff;

ACTCACHE_AVX512 std::size_t rank_avx512(const std::uint8_t* exponents, const std::uint8_t* base, std::size_t n,
                                        const std::uint8_t* rank_of_symbol, std::uint8_t* ranks,
                                        std::uint8_t* outside) {
    const __m512i table =
        _mm512_maskz_broadcast_i32x4(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rank_of_symbol)));
    const __m512i last = _mm512_set1_epi8(kOutside);
    std::size_t n_outside = 0;
    for (std::size_t i = 0; i < n; i += 64) {
        const __m512i exponent = _mm512_loadu_si512(exponents + i);
        const __m512i symbols = _mm512_min_epu8(_mm512_sub_epi8(exponent, _mm512_loadu_si512(base + i)), last);
        _mm512_storeu_si512(ranks + i, _mm512_shuffle_epi8(table, symbols));
        const __mmask64 mask = _mm512_cmpeq_epi8_mask(symbols, last);
        if (mask == 0) continue;
        _mm512_storeu_si512(outside + n_outside, _mm512_maskz_compress_epi8(mask, exponent));
        n_outside += static_cast<std::size_t>(__builtin_popcountll(mask));
    }
    return n_outside;
}

ACTCACHE_AVX512 std::size_t unrank_avx512(const std::uint8_t* ranks, const std::uint8_t* base, std::size_t n,
                                          const std::uint8_t* symbol_of_rank, const std::uint8_t* outside,
                                          std::uint8_t* exponents) {
    const __m512i table =
        _mm512_maskz_broadcast_i32x4(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(symbol_of_rank)));
    std::size_t n_outside = 0;
    for (std::size_t i = 0; i < n; i += 64) {
        const __m512i symbols = _mm512_shuffle_epi8(table, _mm512_loadu_si512(ranks + i));
        _mm512_storeu_si512(exponents + i, _mm512_add_epi8(_mm512_loadu_si512(base + i), symbols));
        // `outside` is read byte by byte: it may end where the data end.
        for (std::uint64_t mask = _mm512_cmpeq_epi8_mask(symbols, _mm512_set1_epi8(kOutside)); mask != 0;
             mask &= mask - 1) {
            exponents[i + static_cast<std::size_t>(__builtin_ctzll(mask))] = outside[n_outside++];
        }
    }
    return n_outside;
}

ACTCACHE_AVX512 std::size_t encode_avx512(const std::uint8_t* values, std::size_t n, std::uint8_t* codes,
                                          std::uint8_t* next) {
    const __m512i three = _mm512_set1_epi8(3);
    const __m512i pairs = _mm512_set1_epi16(0x0401);
    const __m512i quads = _mm512_set1_epi32(0x00100001);
    std::size_t n_next = 0;
    for (std::size_t i = 0; i < n; i += 64) {
        const __m512i value = _mm512_loadu_si512(values + i);
        const __m512i code = _mm512_min_epu8(value, three);
        const __m512i packed = _mm512_madd_epi16(_mm512_maddubs_epi16(code, pairs), quads);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i / 4), _mm512_maskz_cvtepi32_epi8(kAll, packed));
        if (next == nullptr) continue;
        const __mmask64 escapes = _mm512_cmpeq_epi8_mask(code, three);
        // To a register first: some processors take a hundred cycles to compress into memory.
        _mm512_storeu_si512(next + n_next, _mm512_maskz_compress_epi8(escapes, _mm512_sub_epi8(value, three)));
        n_next += static_cast<std::size_t>(__builtin_popcountll(escapes));
    }
    return n_next;
}

ACTCACHE_AVX512 std::size_t decode_avx512(const std::uint8_t* codes, std::size_t n, const std::uint8_t* next,
                                          std::uint8_t* values) {
    const __m512i three = _mm512_set1_epi8(3);
    std::size_t n_next = 0;
    for (std::size_t i = 0; i < n; i += 64) {
        const __m512i four =
            _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 4)));
        const __m512i two = _mm512_or_si512(four, _mm512_maskz_slli_epi32(kAll, four, 12));
        const __m512i code = _mm512_and_si512(_mm512_or_si512(two, _mm512_maskz_slli_epi32(kAll, two, 6)), three);
        if (next == nullptr) {
            _mm512_storeu_si512(values + i, code);
            continue;
        }
        const __mmask64 escapes = _mm512_cmpeq_epi8_mask(code, three);
        const __m512i behind = _mm512_maskz_expand_epi8(escapes, _mm512_loadu_si512(next + n_next));
        _mm512_storeu_si512(values + i, _mm512_add_epi8(code, behind));
        n_next += static_cast<std::size_t>(__builtin_popcountll(escapes));
    }
    return n_next;
}

#endif

std::size_t whole_blocks(std::size_t n) { return n / kBlock * kBlock; }

}  // namespace

std::size_t rank_exponents(const std::uint8_t* exponents, const std::uint8_t* base, std::size_t n,
                           const std::uint8_t* rank_of_symbol, std::uint8_t* ranks, std::uint8_t* outside) {
    std::size_t done = 0;
    std::size_t n_outside = 0;
#if defined(ACTCACHE_X86)
    if (isa() != Isa::kPortable) {
        done = whole_blocks(n);
        n_outside =
            (isa() == Isa::kAvx512 ? rank_avx512 : rank_avx2)(exponents, base, done, rank_of_symbol, ranks, outside);
    }
#endif
    return n_outside +
           rank_portable(exponents + done, base + done, n - done, rank_of_symbol, ranks + done, outside + n_outside);
}

std::size_t unrank_exponents(const std::uint8_t* ranks, const std::uint8_t* base, std::size_t n,
                             const std::uint8_t* symbol_of_rank, const std::uint8_t* outside, std::uint8_t* exponents) {
    std::size_t done = 0;
    std::size_t n_outside = 0;
#if defined(ACTCACHE_X86)
    if (isa() != Isa::kPortable) {
        done = whole_blocks(n);
        n_outside = (isa() == Isa::kAvx512 ? unrank_avx512 : unrank_avx2)(ranks, base, done, symbol_of_rank, outside,
                                                                          exponents);
    }
#endif
    return n_outside +
           unrank_portable(ranks + done, base + done, n - done, symbol_of_rank, outside + n_outside, exponents + done);
}

std::size_t encode_level(const std::uint8_t* values, std::size_t n, std::uint8_t* codes, std::uint8_t* next) {
    std::size_t done = 0;
    std::size_t n_next = 0;
#if defined(ACTCACHE_X86)
    if (isa() != Isa::kPortable) {
        done = whole_blocks(n);
        n_next = (isa() == Isa::kAvx512 ? encode_avx512 : encode_avx2)(values, done, codes, next);
    }
#endif
    return n_next + encode_portable(values + done, n - done, codes + done / 4, next == nullptr ? next : next + n_next);
}

std::size_t decode_level(const std::uint8_t* codes, std::size_t n, const std::uint8_t* next, std::uint8_t* values) {
    std::size_t done = 0;
    std::size_t n_next = 0;
#if defined(ACTCACHE_X86)
    if (isa() != Isa::kPortable) {
        done = whole_blocks(n);
        n_next = (isa() == Isa::kAvx512 ? decode_avx512 : decode_avx2)(codes, done, next, values);
    }
#endif
    return n_next + decode_portable(codes + done / 4, n - done, next == nullptr ? next : next + n_next, values + done);
}

std::size_t count_codes(const std::uint8_t* codes, std::size_t n, unsigned code) {
#if defined(ACTCACHE_X86)
    if (isa() != Isa::kPortable) return count_popcnt(codes, n, code);
#endif
    return count_portable(codes, n, code);
}

}  // namespace actcache
