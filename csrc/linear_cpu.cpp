// Linear layers by bfloat16 products on the CPU, by blocks of rows dealt out to threads.
//
// Rows and weights are split into pieces and laid out as the tiles read them, with zeros where a matrix ends. A block of
// results stays in four tiles while two tiles of rows and two of weights go by, piece by piece, step by step; pieces that
// a block of weights does not have are passed over. The rows laid out at a time stay in the second cache while all
// weights pass by.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "shares.h"

#if defined(ACTCACHE_AMX)
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what GCC's own headers leave undefined on purpose
#endif
#endif

namespace actcache {
namespace {

constexpr std::int64_t kTile = 16;          // rows of a tile
constexpr std::int64_t kStep = 32;          // bfloat16 in a row of a tile: as much of n_in at a time
constexpr std::int64_t kBlock = 2 * kTile;  // rows, and columns, of a block of results
constexpr std::int64_t kPieces = 3;         // of a float32
constexpr std::int64_t kTileWords = kTile * kStep;
constexpr std::int64_t kPieceWords = 2 * kTileWords;        // of a block's two tiles
constexpr std::int64_t kStepWords = kPieces * kPieceWords;  // [kPieces][2][kTile][kStep]
constexpr std::int64_t kStepBytes = 2 * kStepWords;

// How much is laid out at a time: steps of n_in, blocks of rows (in half of a second cache), blocks of weights.
constexpr std::int64_t kMostSteps = 24;
constexpr std::int64_t kRowBytes = std::int64_t{1} << 20;
constexpr std::int64_t kWeightBytes = std::int64_t{6} << 20;

constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// A corner of a matrix, at most a tile of it.
struct Part {
    const float* from;
    std::int64_t stride;
    std::int64_t n_rows;
    std::int64_t n_columns;
};

std::uint16_t nearest_bfloat16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7f800000u) == 0) return static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float as_float(std::uint16_t word) {
    const std::uint32_t bits = std::uint32_t{word} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A tile of each piece of the part, kPieceWords apart; of weights turned over by pairs of words, which is how a tile
// holds the second factor: [k / 2][row][k % 2] instead of [row][k]. Returns how many pieces are not all zeros: one where
// the floats came from bfloat16.
std::int64_t lay_out_portable(const Part& part, bool turned, std::uint16_t* to) {
    std::int64_t n_pieces = 1;
    for (std::int64_t row = 0; row < kTile; ++row) {
        for (std::int64_t k = 0; k < kStep; ++k) {
            float left = row < part.n_rows && k < part.n_columns ? part.from[row * part.stride + k] : 0.0f;
            const std::int64_t at = turned ? k / 2 * kStep + row * 2 + k % 2 : row * kStep + k;
            for (std::int64_t piece = 0; piece < kPieces; ++piece) {
                const std::uint16_t word = nearest_bfloat16(left);
                to[piece * kPieceWords + at] = word;
                if (word != 0) n_pieces = std::max(n_pieces, piece + 1);
                const bool finite = (word & 0x7f80u) != 0x7f80u;
                left = finite ? left - as_float(word) : 0.0f;
            }
        }
    }
    return n_pieces;
}

// block[kBlock][kBlock] = the products of two blocks' pieces, summed over so many steps. The weights' further pieces are
// zeros.
void multiply_portable(const std::uint16_t* rows, const std::uint16_t* weights, std::int64_t n_steps,
                       std::int64_t n_pieces, float* block) {
    std::fill(block, block + kBlock * kBlock, 0.0f);
    for (std::int64_t step = 0; step < n_steps; ++step, rows += kStepWords, weights += kStepWords) {
        for (std::int64_t i = 0; i < kPieces; ++i) {
            for (std::int64_t j = 0; i + j < kPieces && j < n_pieces; ++j) {
                for (std::int64_t r = 0; r < kBlock; ++r) {
                    const std::uint16_t* row = rows + i * kPieceWords + r * kStep;
                    for (std::int64_t c = 0; c < kBlock; ++c) {
                        const std::uint16_t* column =
                            weights + j * kPieceWords + c / kTile * kTileWords + c % kTile * 2;
                        float sum = block[r * kBlock + c];
                        for (std::int64_t k = 0; k < kStep; ++k) {
                            sum += as_float(row[k]) * as_float(column[k / 2 * kStep + k % 2]);
                        }
                        block[r * kBlock + c] = sum;
                    }
                }
            }
        }
    }
}

// A block of results, or the part of it that lies within the matrix.
void store_portable(const float* block, float* out, std::int64_t stride, std::int64_t n_rows, std::int64_t n_columns) {
    for (std::int64_t i = 0; i < n_rows; ++i) {
        std::memcpy(out + i * stride, block + i * kBlock, static_cast<std::size_t>(n_columns) * sizeof(float));
    }
}

#if defined(ACTCACHE_AMX)

ACTCACHE_AMX inline __m512 left_over(__m512 value, __m256i words) {
    const __m512 piece = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    const __m512 infinity = _mm512_set1_ps(__builtin_inff());
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(piece), infinity, _CMP_LT_OQ);
    return _mm512_maskz_sub_ps(finite, value, piece);
}

ACTCACHE_AMX inline void split(const float* from, __mmask32 columns, __m512i (&pieces)[kPieces]) {
    __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns), from);
    __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(columns >> kTile), from + kTile);
    for (std::int64_t piece = 0; piece < kPieces; ++piece) {
        const __m512i words = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        pieces[piece] = words;
        if (piece + 1 == kPieces) break;
        low = left_over(low, _mm512_castsi512_si256(words));
        high = left_over(high, _mm512_extracti64x4_epi64(words, 1));
    }
}

// 16 x 16 pairs of words, rows for columns.
ACTCACHE_AMX inline void turn_over(__m512i (&rows)[kTile]) {
    __m512i other[kTile];
    for (int i = 0; i < kTile; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < kTile; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
        rows[i + 12] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0xdd);
    }
}

ACTCACHE_AMX std::int64_t lay_out_amx(const Part& part, bool turned, std::uint16_t* to) {
    const auto columns = static_cast<__mmask32>(part.n_columns == kStep ? ~0u : (1u << part.n_columns) - 1u);
    __m512i words[kPieces][kTile] = {};
    __m512i any[kPieces] = {};
    for (std::int64_t row = 0; row < part.n_rows; ++row) {
        const float* from = part.from + row * part.stride;
        __builtin_prefetch(from + 2 * kStep);  // more rows than processors look ahead in by themselves
        __builtin_prefetch(from + 2 * kStep + kTile);
        __m512i pieces[kPieces];
        split(from, columns, pieces);
        for (std::int64_t piece = 0; piece < kPieces; ++piece) {
            words[piece][row] = pieces[piece];
            any[piece] = _mm512_or_si512(any[piece], pieces[piece]);
        }
    }
    std::int64_t n_pieces = 1;
    for (std::int64_t piece = 0; piece < kPieces; ++piece) {
        if (_mm512_test_epi32_mask(any[piece], any[piece]) != 0) {
            n_pieces = piece + 1;
            if (turned) turn_over(words[piece]);
        }
        for (std::int64_t row = 0; row < kTile; ++row) {
            _mm512_store_si512(to + piece * kPieceWords + row * kStep, words[piece][row]);
        }
    }
    return n_pieces;
}

// What the tile registers look like, as the processor takes it.
struct alignas(64) TileShapes {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t n_rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
};
static_assert(sizeof(TileShapes) == 64);
constexpr TileShapes kOwnTiles;

// Tiles of ours within this scope. Others in the process keep theirs from call to call and do not look (oneDNN).
class OwnTiles {
   public:
    ACTCACHE_AMX OwnTiles() {
        _tile_storeconfig(&before_);
        _tile_loadconfig(&kOwnTiles);
    }
    ACTCACHE_AMX ~OwnTiles() { _tile_loadconfig(&before_); }
    OwnTiles(const OwnTiles&) = delete;
    OwnTiles& operator=(const OwnTiles&) = delete;

   private:
    TileShapes before_;
};

// Tiles 0 to 3 hold results, 4 and 5 a piece of the rows, 6 and 7 one of the weights. From product to product
// one of the two changes, so that half as many are loaded.
template <std::int64_t n_pieces>
ACTCACHE_AMX void multiply_pieces(const std::uint16_t* rows, const std::uint16_t* weights, std::int64_t n_steps,
                                  float* block) {
#define LOAD_ROWS(piece)                              \
    _tile_loadd(4, rows + (piece) * kPieceWords, 64); \
    _tile_loadd(5, rows + (piece) * kPieceWords + kTileWords, 64)
#define LOAD_WEIGHTS(piece)                              \
    _tile_loadd(6, weights + (piece) * kPieceWords, 64); \
    _tile_loadd(7, weights + (piece) * kPieceWords + kTileWords, 64)
#define MULTIPLY()           \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7)
    asm volatile("" ::: "memory");  // what was laid out is in memory: compilers do not see that tiles read it
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t step = 0; step < n_steps; ++step, rows += kStepWords, weights += kStepWords) {
        if constexpr (n_pieces > 1) {
            LOAD_ROWS(0);
            if constexpr (n_pieces > 2) {
                LOAD_WEIGHTS(2);
                MULTIPLY();
            }
            LOAD_WEIGHTS(1);
            MULTIPLY();
        }
        LOAD_ROWS(1);
        if constexpr (n_pieces > 1) {
            MULTIPLY();
        }
        LOAD_WEIGHTS(0);
        MULTIPLY();
        LOAD_ROWS(2);
        MULTIPLY();
        LOAD_ROWS(0);
        MULTIPLY();
    }
    constexpr int kRow = kBlock * sizeof(float);
    _tile_stored(0, block, kRow);
    _tile_stored(1, block + kTile, kRow);
    _tile_stored(2, block + kTile * kBlock, kRow);
    _tile_stored(3, block + kTile * kBlock + kTile, kRow);
#undef LOAD_ROWS
#undef LOAD_WEIGHTS
#undef MULTIPLY
}

ACTCACHE_AMX void multiply_amx(const std::uint16_t* rows, const std::uint16_t* weights, std::int64_t n_steps,
                               std::int64_t n_pieces, float* block) {
    if (n_pieces == 1) return multiply_pieces<1>(rows, weights, n_steps, block);
    if (n_pieces == 2) return multiply_pieces<2>(rows, weights, n_steps, block);
    multiply_pieces<kPieces>(rows, weights, n_steps, block);
}

// Past the caches, as far as lines are written whole: results are larger than the second cache, and a line that is not
// in it would be fetched only to be overwritten.
ACTCACHE_AMX void store_amx(const float* block, float* out, std::int64_t stride, std::int64_t n_rows,
                            std::int64_t n_columns) {
    constexpr std::uintptr_t kLine = 64;
    const bool whole = reinterpret_cast<std::uintptr_t>(out) % kLine == 0 && stride % kTile == 0;
    if (!whole || n_columns < kBlock) return store_portable(block, out, stride, n_rows, n_columns);
    for (std::int64_t i = 0; i < n_rows; ++i, block += kBlock, out += stride) {
        _mm512_stream_ps(out, _mm512_load_ps(block));
        _mm512_stream_ps(out + kTile, _mm512_load_ps(block + kTile));
    }
}

#endif  // ACTCACHE_AMX

// How one call goes about it: what is laid out at a time.
struct Plan {
    Plan(const LinearParams& p, std::int64_t n_rows)
        : steps(ceil_div(p.n_in, kStep)),
          steps_at_once(std::min(steps, kMostSteps)),
          column_blocks(ceil_div(p.n_out, kBlock)),
          rows_at_once(std::clamp(kRowBytes / (steps_at_once * kStepBytes), std::int64_t{1}, ceil_div(n_rows, kBlock))),
          columns_at_once(std::clamp(kWeightBytes / (steps_at_once * kStepBytes), std::int64_t{1}, column_blocks)) {}

    std::int64_t steps;
    std::int64_t steps_at_once;
    std::int64_t column_blocks;
    std::int64_t rows_at_once;     // blocks
    std::int64_t columns_at_once;  // blocks
};

// Words at a multiple of 64 bytes, kept until more are wanted.
class Words {
   public:
    void reserve(std::int64_t n) {
        if (n <= size_) return;
        words_.reset();
        size_ = 0;
        words_.reset(static_cast<std::uint16_t*>(
            ::operator new(static_cast<std::size_t>(n) * sizeof(std::uint16_t), std::align_val_t{64})));
        size_ = n;
    }
    std::uint16_t* at(std::int64_t i) const { return words_.get() + i; }

   private:
    struct Free {
        void operator()(std::uint16_t* words) const { ::operator delete(words, std::align_val_t{64}); }
    };
    std::unique_ptr<std::uint16_t, Free> words_;
    std::int64_t size_ = 0;
};

struct Workspace {
    void reserve(const Plan& plan) {
        rows.reserve(plan.rows_at_once * plan.steps_at_once * kStepWords);
        weights.reserve(plan.columns_at_once * plan.steps_at_once * kStepWords);
        n_pieces.resize(static_cast<std::size_t>(plan.columns_at_once));
    }

    Words rows;                          // [block][step][kStepWords]
    Words weights;                       // likewise
    std::vector<std::int64_t> n_pieces;  // of every block of weights
};

// Two tiles of each of these steps: rows first..first + kBlock of a matrix of n_rows x n_columns. Returns how many
// pieces are not all zeros.
template <typename Means>
ACTCACHE_BODY std::int64_t lay_out_block(const Means& means, bool turned, const float* matrix, std::int64_t stride,
                                         std::int64_t n_rows, std::int64_t n_columns, std::int64_t first,
                                         std::int64_t first_step, std::int64_t n_steps, std::uint16_t* to) {
    std::int64_t n_pieces = 1;
    for (std::int64_t row = first; row < first + kBlock; row += kTile, to += kTileWords) {
        const std::int64_t rows_left = std::clamp(n_rows - row, std::int64_t{0}, kTile);
        for (std::int64_t s = 0; s < n_steps; ++s) {
            const std::int64_t column = (first_step + s) * kStep;
            const float* from = rows_left == 0 ? matrix : matrix + row * stride + column;
            const Part part{from, stride, rows_left, std::min(kStep, n_columns - column)};
            n_pieces = std::max(n_pieces, means.lay_out(part, turned, to + s * kStepWords));
        }
    }
    return n_pieces;
}

// Puts a block of sums where it belongs: over what is there, or added to it, or to the bias where these are the first.
template <typename Means>
ACTCACHE_BODY void put(const Means& means, const float* block, bool is_first, bool is_last, const LinearParams& p,
                       std::int64_t row, std::int64_t end, std::int64_t column) {
    const std::int64_t n_rows = std::min(kBlock, end - row), n_columns = std::min(kBlock, p.n_out - column);
    float* out = p.out + row * p.n_out + column;
    if (is_first && is_last && p.bias == nullptr) return means.store(block, out, p.n_out, n_rows, n_columns);
    for (std::int64_t i = 0; i < n_rows; ++i, block += kBlock, out += p.n_out) {
        for (std::int64_t j = 0; j < n_columns; ++j) {
            const float before = !is_first ? out[j] : p.bias == nullptr ? 0.0f : p.bias[column + j];
            out[j] = before + block[j];
        }
    }
}

// Rows begin..end - 1 of the result.
template <typename Means>
ACTCACHE_BODY void linear_body(const Means& means, const LinearParams& p, std::int64_t begin, std::int64_t end,
                               const Plan& plan, Workspace& work) {
    alignas(64) float block[kBlock * kBlock];
    const std::int64_t rows_at_once = plan.rows_at_once * kBlock;
    for (std::int64_t step = 0; step < plan.steps; step += plan.steps_at_once) {
        const std::int64_t n_steps = std::min(plan.steps_at_once, plan.steps - step);
        const std::int64_t block_words = n_steps * kStepWords;
        const bool is_first = step == 0, is_last = step + n_steps == plan.steps;
        for (std::int64_t column = 0; column < plan.column_blocks; column += plan.columns_at_once) {
            const std::int64_t n_columns = std::min(plan.columns_at_once, plan.column_blocks - column);
            for (std::int64_t row = begin; row < end; row += rows_at_once) {
                const std::int64_t n_rows = ceil_div(std::min(rows_at_once, end - row), kBlock);
                for (std::int64_t r = 0; r < n_rows; ++r) {
                    lay_out_block(means, false, p.rows, p.row_stride, end, p.n_in, row + r * kBlock, step, n_steps,
                                  work.rows.at(r * block_words));
                }
                for (std::int64_t c = 0; c < n_columns; ++c) {
                    const std::int64_t first = (column + c) * kBlock;
                    std::uint16_t* weights = work.weights.at(c * block_words);
                    std::int64_t& n_pieces = work.n_pieces[static_cast<std::size_t>(c)];
                    if (row == begin) {
                        n_pieces = lay_out_block(means, true, p.weight, p.n_in, p.n_out, p.n_in, first, step, n_steps,
                                                 weights);
                    }
                    for (std::int64_t r = 0; r < n_rows; ++r) {
                        means.multiply(work.rows.at(r * block_words), weights, n_steps, n_pieces, block);
                        put(means, block, is_first, is_last, p, row + r * kBlock, end, first);
                    }
                }
            }
        }
    }
}

struct Portable {
    static constexpr auto lay_out = lay_out_portable;
    static constexpr auto multiply = multiply_portable;
    static constexpr auto store = store_portable;
};

#if defined(ACTCACHE_AMX)
struct Amx {
    static constexpr auto lay_out = lay_out_amx;
    static constexpr auto multiply = multiply_amx;
    static constexpr auto store = store_amx;
};
#endif

void linear_rows(const LinearParams& p, std::int64_t begin, std::int64_t end, const Plan& plan, Workspace& work) {
#if defined(ACTCACHE_AMX)
    if (has_tiles()) {
        const OwnTiles tiles;
        linear_body(Amx(), p, begin, end, plan, work);
        _mm_sfence();  // before others are told of the result: what went past the caches is in no order
        return;
    }
#endif
    linear_body(Portable(), p, begin, end, plan, work);
}

}  // namespace

void linear_cpu(const LinearParams& params, int n_threads) {
    const LinearParams& p = params;
    if (p.n_rows == 0) return;
    const std::int64_t n_blocks = ceil_div(p.n_rows, kBlock);
    // A thread takes as long to start as some millions of products.
    const std::int64_t bytes =
        std::min(p.n_rows * p.n_in, kMaxBytes >> 20) * std::min<std::int64_t>(p.n_out, 1 << 20) / 64;
    const auto n_shares = std::min<std::int64_t>(n_threads, n_blocks);
    const Plan plan(p, ceil_div(n_blocks, n_shares) * kBlock);
    // Kept from call to call: new memory would be faulted in page by page, which can outlast a small product. And taken
    // here: an exception within a thread would end the process.
    thread_local std::vector<Workspace> kept;
    if (kept.size() < static_cast<std::size_t>(n_shares)) kept.resize(static_cast<std::size_t>(n_shares));
    std::vector<Workspace>& spaces = kept;  // other threads have one of their own by that name
    for (std::int64_t i = 0; i < n_shares; ++i) spaces[static_cast<std::size_t>(i)].reserve(plan);
    std::atomic<std::size_t> n_taken{0};
    deal_out(n_blocks, std::max<std::int64_t>(bytes, 1), n_threads, [&](std::int64_t begin, std::int64_t end) {
        linear_rows(p, begin * kBlock, std::min(end * kBlock, p.n_rows), plan, spaces[n_taken++]);
    });
}

}  // namespace actcache
