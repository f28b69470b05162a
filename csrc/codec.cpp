// The codec of bf16 planes: PLANES.md in code.
//
// Work goes in tiles that stay in the first-level cache: a tile of words is split, its exponents become ranks, and the
// ranks the codes of level 0, whose escapes are gathered for the levels behind it.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "escape_code.h"
#include "planes.h"

namespace actcache {
namespace {

constexpr std::array<unsigned char, 4> kMagic = {'A', 'B', 'P', '1'};
constexpr std::size_t kTile = 4096;  // a multiple of every block
// What the encoder looks at to choose bases and ranks. More would hardly better the ratio, and cost time.
constexpr std::size_t kPiecesForBases = 32;
constexpr std::size_t kRuns = 128;
constexpr std::size_t kRunWords = 64;
constexpr std::size_t kPieceWords = 512;
constexpr std::size_t kLargest = 5;
// A row of bases is a byte a word of a row: with fewer rows than this to share it, one base serves all.
constexpr std::size_t kRowsWorthBases = 16;

enum class Mode : unsigned char { kStored = 0, kCoded = 1 };

using Bytes = std::unique_ptr<std::uint8_t[]>;

// Not zeroed: make_unique would be a pass over memory that is about to be written.
Bytes uninitialised(std::size_t n) { return Bytes(new std::uint8_t[n]); }

void put64(unsigned char* at, std::uint64_t value) {
    for (unsigned i = 0; i < 8; ++i) at[i] = static_cast<unsigned char>(value >> 8 * i);
}

std::uint64_t get64(const unsigned char* at) {
    std::uint64_t value = 0;
    for (unsigned i = 0; i < 8; ++i) value |= std::uint64_t{at[i]} << 8 * i;
    return value;
}

struct Header {
    Mode mode;
    std::uint64_t n_words;
    std::uint64_t n_coded;    // the words behind them are zero
    std::uint64_t row_words;  // length of the row of bases
    std::array<std::uint8_t, kSymbols> symbol_of_rank;
};

void put_header(const Header& header, unsigned char* at) {
    std::memset(at, 0, kHeaderBytes);
    std::copy(kMagic.begin(), kMagic.end(), at);
    at[4] = static_cast<unsigned char>(header.mode);
    put64(at + 8, header.n_words);
    put64(at + 16, header.n_coded);
    put64(at + 24, header.row_words);
    if (header.mode == Mode::kStored) return;
    for (std::size_t rank = 0; rank < kSymbols; ++rank) {
        at[32 + rank / 2] =
            static_cast<unsigned char>(at[32 + rank / 2] | header.symbol_of_rank[rank] << 4 * (rank % 2));
    }
}

std::array<std::uint8_t, kSymbols> inverse(const std::array<std::uint8_t, kSymbols>& permutation) {
    std::array<std::uint8_t, kSymbols> inverted{};
    for (std::size_t i = 0; i < kSymbols; ++i) inverted[permutation[i]] = static_cast<std::uint8_t>(i);
    return inverted;
}

// The row of bases, repeated, so that the bases of any tile lie in one piece.
Bytes tiled(const std::uint8_t* base, std::size_t row_words) {
    Bytes bases = uninitialised(row_words + kTile);
    std::memcpy(bases.get(), base, row_words);
    for (std::size_t i = row_words; i < row_words + kTile; i += std::min(row_words, row_words + kTile - i)) {
        std::memcpy(bases.get() + i, base, std::min(row_words, row_words + kTile - i));
    }
    return bases;
}

std::size_t without_trailing_zeros(const unsigned char* words, std::size_t n) {
    while (n > 0 && words[2 * n - 1] == 0 && words[2 * n - 2] == 0) --n;
    return n;
}

// The kLargest largest exponents of each place, in falling order, brought up to date with n more, which are lost.
void keep_largest(std::uint8_t* __restrict__ exponents, std::size_t n, std::uint8_t* __restrict__ largest) {
    for (std::size_t k = 0; k < kLargest; ++k, largest += n) {
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint8_t larger = std::max(largest[i], exponents[i]);
            exponents[i] = std::min(largest[i], exponents[i]);
            largest[i] = larger;
        }
    }
}

// What the encoder chooses; any choice decodes, this one compresses.
struct Choice {
    std::size_t row_words;
    Bytes base;
    std::array<std::uint8_t, kSymbols> symbol_of_rank;
};

// A column's base comes from its exponent that about a sixth of the rows exceed: exponents crowd below their column's
// scale and thin out below it, so a high quantile of few rows says more than a mean of many. To it is added the start
// of the 15 exponents around those that occur most. Symbols are ranked by how often they occur.
Choice choose(const unsigned char* words, std::size_t n, std::size_t row_words) {
    Choice choice{};
    choice.row_words = row_words <= n / kRowsWorthBases ? row_words : 1;
    const std::size_t row = choice.row_words;
    const std::size_t piece = row * std::min(n / row, std::max<std::size_t>(1, kPieceWords / row));
    const std::size_t n_pieces = n / piece;
    const std::size_t n_for_bases = std::min(n_pieces, kPiecesForBases);

    const Bytes exponents = uninitialised(piece);
    const Bytes spare = uninitialised(piece);
    const std::unique_ptr<std::uint8_t[]> largest(new std::uint8_t[kLargest * piece]());
    for (std::size_t k = 0; k < n_for_bases; ++k) {
        const std::size_t first = k * n_pieces / n_for_bases * piece;
        split_words(words + 2 * first, piece, exponents.get(), spare.get());
        keep_largest(exponents.get(), piece, largest.get());
    }
    const std::size_t nth = std::max<std::size_t>(1, n_for_bases * kLargest / kPiecesForBases) - 1;
    std::vector<std::size_t> sums(row);
    for (std::size_t first = nth * piece; first < (nth + 1) * piece; first += row) {
        for (std::size_t c = 0; c < row; ++c) sums[c] += largest[first + c];
    }
    choice.base = uninitialised(row);
    for (std::size_t c = 0; c < row; ++c) choice.base[c] = static_cast<std::uint8_t>(sums[c] / (piece / row));

    // Short runs from many rows: the few rows of a far larger norm, such as a first token's, must not all be missed.
    // Four tables: neighbours are often equal, and an increment would wait for the one before it.
    const std::size_t run = std::min(n, kRunWords);
    const std::size_t n_runs = std::min(n / run, kRuns);
    const Bytes bases = tiled(choice.base.get(), row);
    std::array<std::array<std::uint32_t, 256>, 4> tables{};
    std::array<std::uint8_t, kRunWords> exponents_of_run;
    std::array<std::uint8_t, kRunWords> unused;
    for (std::size_t k = 0; k < n_runs; ++k) {
        const std::size_t first = k * (n / n_runs);
        split_words(words + 2 * first, run, exponents_of_run.data(), unused.data());
        const std::uint8_t* base = bases.get() + first % row;
        for (std::size_t i = 0; i < run; ++i) ++tables[i % 4][static_cast<std::uint8_t>(exponents_of_run[i] - base[i])];
    }
    std::array<std::uint32_t, 256> histogram{};
    for (const auto& table : tables) {
        for (std::size_t i = 0; i < 256; ++i) histogram[i] += table[i];
    }
    std::uint32_t inside = std::accumulate(histogram.begin(), histogram.begin() + kOutside, std::uint32_t{0});
    std::uint32_t most = inside;
    std::size_t start = 0;
    for (std::size_t first = 1; first < 256; ++first) {
        inside += histogram[(first + kOutside - 1) % 256] - histogram[first - 1];
        if (inside > most) {
            most = inside;
            start = first;
        }
    }
    std::array<std::uint32_t, kSymbols> counts{};
    for (std::size_t symbol = 0; symbol < kOutside; ++symbol) counts[symbol] = histogram[(start + symbol) % 256];
    counts[kOutside] = static_cast<std::uint32_t>(n_runs * run) - most;
    for (std::size_t c = 0; c < row; ++c) choice.base[c] = static_cast<std::uint8_t>(choice.base[c] + start);
    std::iota(choice.symbol_of_rank.begin(), choice.symbol_of_rank.end(), std::uint8_t{0});
    std::stable_sort(choice.symbol_of_rank.begin(), choice.symbol_of_rank.end(),
                     [&counts](std::uint8_t a, std::uint8_t b) { return counts[a] > counts[b]; });
    return choice;
}

// For one more tile behind the first n.
void make_room(std::vector<std::uint8_t>* bytes, std::size_t n) {
    if (bytes->size() < n + kTile + kSlack) bytes->resize(2 * n + kTile + kSlack);
}

// The coded form of `n_words` words, all zero from the n-th on, or 0 where it would not be smaller than `limit`.
std::size_t encode_coded(const unsigned char* words, std::size_t n_words, std::size_t n, std::size_t row_words,
                         unsigned char* out, std::size_t limit) {
    if (n == 0) return 0;
    const Choice choice = choose(words, n, row_words);
    std::size_t size = kHeaderBytes + choice.row_words + n + code_bytes(n);
    if (size >= limit) return 0;
    put_header({Mode::kCoded, n_words, n, choice.row_words, choice.symbol_of_rank}, out);
    std::memcpy(out + kHeaderBytes, choice.base.get(), choice.row_words);
    unsigned char* rests = out + kHeaderBytes + choice.row_words;
    unsigned char* codes = rests + n;

    const Bytes bases = tiled(choice.base.get(), choice.row_words);
    const auto rank_of_symbol = inverse(choice.symbol_of_rank);
    // Sized for what is usual, as memory that is new to a process costs more than this codec's work on it.
    std::vector<std::uint8_t> values(n / 2 + kTile + kSlack);
    std::vector<std::uint8_t> outside(kTile + kSlack);
    std::size_t n_values = 0;
    std::size_t n_outside = 0;
    std::array<std::uint8_t, kTile> exponents;
    std::array<std::uint8_t, kTile> ranks;
    for (std::size_t begin = 0; begin < n; begin += kTile) {
        const std::size_t count = std::min(kTile, n - begin);
        make_room(&values, n_values);
        make_room(&outside, n_outside);
        split_words(words + 2 * begin, count, exponents.data(), rests + begin);
        n_outside += rank_exponents(exponents.data(), bases.get() + begin % choice.row_words, count,
                                    rank_of_symbol.data(), ranks.data(), outside.data() + n_outside);
        n_values += encode_level(ranks.data(), count, codes + begin / 4, values.data() + n_values);
    }
    std::vector<std::uint8_t> next(n_values + kSlack);
    for (std::size_t level = 1; level < kLevels; ++level) {
        codes = out + size;
        size += code_bytes(n_values);
        if (size >= limit) return 0;
        n_values = encode_level(values.data(), n_values, codes, level + 1 < kLevels ? next.data() : nullptr);
        std::swap(values, next);
    }
    if (size + n_outside >= limit) return 0;
    std::memcpy(out + size, outside.data(), n_outside);
    return size + n_outside;
}

// The header, or why there is none.
const char* get_header(const unsigned char* data, std::size_t size, std::size_t n, Header* header) {
    if (size < kHeaderBytes) return "it ends within its header";
    if (!std::equal(kMagic.begin(), kMagic.end(), data)) return "it does not begin with ABP1";
    if (data[4] > 1) return "its mode is unknown";
    if (data[5] != 0 || data[6] != 0 || data[7] != 0) return "its reserved bytes are not zero";
    *header = {static_cast<Mode>(data[4]), get64(data + 8), get64(data + 16), get64(data + 24), {}};
    if (header->n_words != n) return "it holds another number of words";
    for (std::size_t rank = 0; rank < kSymbols; ++rank) {
        header->symbol_of_rank[rank] = data[32 + rank / 2] >> 4 * (rank % 2) & 0xf;
    }
    return nullptr;
}

const char* decode_stored(const Header& header, const unsigned char* data, std::size_t size, unsigned char* words) {
    if (header.n_coded != 0 || header.row_words != 0 || get64(data + 32) != 0) {
        return "fields of a coded chunk are set in a stored one";
    }
    // Not 2 * n_words, which may overflow.
    if ((size - kHeaderBytes) % 2 != 0 || (size - kHeaderBytes) / 2 != header.n_words) return "its size does not fit";
    if (size > kHeaderBytes) std::memcpy(words, data + kHeaderBytes, size - kHeaderBytes);
    return nullptr;
}

const char* decode_coded(const Header& header, const unsigned char* data, std::size_t size, unsigned char* words) {
    std::size_t left = size - kHeaderBytes;
    if (header.n_coded == 0 || header.n_coded > header.n_words) return "its number of coded words does not fit";
    if (header.row_words == 0 || header.row_words > header.n_coded) return "its row of bases does not fit";
    unsigned seen = 0;
    for (const std::uint8_t symbol : header.symbol_of_rank) seen |= 1u << symbol;
    if (seen != 0xffff) return "its symbols are not all different";
    if (left < header.row_words) return "it ends within its bases";
    left -= header.row_words;
    if (left < header.n_coded) return "it ends within its plane of rests";
    left -= header.n_coded;
    const std::uint8_t* base = data + kHeaderBytes;
    const std::uint8_t* rests = base + header.row_words;
    const auto n = static_cast<std::size_t>(header.n_coded);

    // Every count is known before anything is decoded, so nothing below needs to look where it reads.
    const auto rank_of_symbol = inverse(header.symbol_of_rank);
    const std::size_t outside_level = std::min<std::size_t>(rank_of_symbol[kOutside] / 3, kLevels - 1);
    std::array<const std::uint8_t*, kLevels> codes;
    std::array<std::size_t, kLevels + 1> counts{};
    counts[0] = n;
    std::size_t n_outside = 0;
    const std::uint8_t* at = rests + n;
    for (std::size_t level = 0; level < kLevels; ++level) {
        const std::size_t bytes = code_bytes(counts[level]);
        if (left < bytes) return "it ends within its codes";
        left -= bytes;
        codes[level] = at;
        at += bytes;
        if (counts[level] % 4 != 0 && codes[level][bytes - 1] >> 2 * (counts[level] % 4) != 0) {
            return "bits behind its codes are set";
        }
        if (level == outside_level) {
            n_outside =
                count_codes(codes[level], counts[level], static_cast<unsigned>(rank_of_symbol[kOutside] - 3 * level));
        }
        counts[level + 1] = count_codes(codes[level], counts[level], 3);
    }
    if (left != n_outside) return "its size does not fit";

    std::array<Bytes, kLevels> values;
    for (std::size_t level = kLevels - 1; level > 0; --level) {
        values[level] = uninitialised(counts[level] + kSlack);
        const std::uint8_t* next = level + 1 < kLevels ? values[level + 1].get() : nullptr;
        decode_level(codes[level], counts[level], next, values[level].get());
    }
    const Bytes bases = tiled(base, static_cast<std::size_t>(header.row_words));
    const std::uint8_t* next = values[1].get();
    const std::uint8_t* outside = at;
    std::array<std::uint8_t, kTile + kSlack> ranks;
    std::array<std::uint8_t, kTile> exponents;
    for (std::size_t begin = 0; begin < n; begin += kTile) {
        const std::size_t count = std::min(kTile, n - begin);
        next += decode_level(codes[0] + begin / 4, count, next, ranks.data());
        outside += unrank_exponents(ranks.data(), bases.get() + begin % header.row_words, count,
                                    header.symbol_of_rank.data(), outside, exponents.data());
        merge_words(exponents.data(), rests + begin, count, words + 2 * begin);
    }
    std::memset(words + 2 * n, 0, 2 * static_cast<std::size_t>(header.n_words - header.n_coded));
    return nullptr;
}

}  // namespace

std::size_t encode_words(const unsigned char* words, std::size_t n, std::size_t row_words, unsigned char* out) {
    const std::size_t stored = encoded_bound(n), n_coded = without_trailing_zeros(words, n);
    if (const std::size_t size = encode_coded(words, n, n_coded, row_words, out, stored)) return size;
    put_header({Mode::kStored, n, 0, 0, {}}, out);
    if (n > 0) std::memcpy(out + kHeaderBytes, words, 2 * n);
    return stored;
}

const char* decode_words(const unsigned char* data, std::size_t size, std::size_t n, unsigned char* words) {
    Header header{};
    if (const char* refusal = get_header(data, size, n, &header)) return refusal;
    return (header.mode == Mode::kStored ? decode_stored : decode_coded)(header, data, size, words);
}

}  // namespace actcache
