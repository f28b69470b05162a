// The escape code: symbols of four bits as codes of two bits, the frequent ones in one code, the others in up to five.
//
// Level 0 has a code for every value, min(value, 3). A code of 3 is an escape: the values behind the escapes, less 3,
// are the values of the next level, in order. On the last level (kLevels - 1) 3 is a value like the others. So rank r
// takes 1 + min(r / 3, kLevels - 1) codes; lengths 2, 2, 2, 4, 4, 4, 6, ... bits fill the Kraft sum exactly, and the
// code is complete: within a percent of the entropy where probabilities halve every one to two symbols, as those of
// exponents do. Unlike a Huffman code it has no bit-by-bit chain: a level is one pass of compares, packs and byte
// compressions over whole registers.
//
// All functions take any n and have one result on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actcache {

constexpr std::size_t kSymbols = 16;
constexpr std::uint8_t kOutside = 15;  // the symbol of every exponent outside the window
constexpr std::size_t kLevels = 5;
// Registers of values are stored and loaded whole: so many bytes behind the end of an array of values must be there.
constexpr std::size_t kSlack = 64;

constexpr std::size_t code_bytes(std::size_t n) { return n / 4 + (n % 4 != 0); }

// ranks[i] = rank_of_symbol[min(exponents[i] - base[i] mod 256, kOutside)]. The exponents outside the window go to
// `outside` (n + kSlack bytes); returns how many.
std::size_t rank_exponents(const std::uint8_t* exponents, const std::uint8_t* base, std::size_t n,
                           const std::uint8_t* rank_of_symbol, std::uint8_t* ranks, std::uint8_t* outside);

// The way back; returns how many of `outside` were used.
std::size_t unrank_exponents(const std::uint8_t* ranks, const std::uint8_t* base, std::size_t n,
                             const std::uint8_t* symbol_of_rank, const std::uint8_t* outside, std::uint8_t* exponents);

// Codes of one level into code_bytes(n) bytes, the first in the lowest bits, the last byte filled up with zeros. Values
// of the next level go to `next` (n + kSlack bytes); returns how many. On the last level `next` is null.
std::size_t encode_level(const std::uint8_t* values, std::size_t n, std::uint8_t* codes, std::uint8_t* next);

// The way back: `next` (kSlack bytes more than are used) has as many values as there are escapes; null on the last
// level. `values` has room for n + kSlack. Returns how many of `next` were used.
std::size_t decode_level(const std::uint8_t* codes, std::size_t n, const std::uint8_t* next, std::uint8_t* values);

// How many of the first n codes are `code`.
std::size_t count_codes(const std::uint8_t* codes, std::size_t n, unsigned code);

}  // namespace actcache
