// Attention of many short sequences on the CPU, by key heads of sequences dealt out to threads.
//
// Four queries at a time. Both products run over pairs of whole registers: scores of as many keys at once, for which a
// key head is turned over first, and as many columns of the values.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "shares.h"

namespace actcache {
namespace {

constexpr std::int64_t kRows = 4;   // queries at a time
constexpr std::int64_t kStep = 32;  // whole steps of keys, or of columns of values, fill pairs of any registers

// The registers of each instruction set: float lanes, and the same bits as words.
template <int kLanes>
struct Register;
template <>
struct Register<4> {
    using Floats = float __attribute__((vector_size(16)));
    using Words = std::uint32_t __attribute__((vector_size(16)));
};
template <>
struct Register<8> {
    using Floats = float __attribute__((vector_size(32)));
    using Words = std::uint32_t __attribute__((vector_size(32)));
};
template <>
struct Register<16> {
    using Floats = float __attribute__((vector_size(64)));
    using Words = std::uint32_t __attribute__((vector_size(64)));
};

template <typename Floats>
ACTCACHE_BODY void load(const float* from, Floats& to) {
    std::memcpy(&to, from, sizeof to);
}

template <typename Floats>
ACTCACHE_BODY void store(const Floats& from, float* to) {
    std::memcpy(to, &from, sizeof from);
}

constexpr std::int64_t round_up(std::int64_t n, std::int64_t step) { return (n + step - 1) / step * step; }

// x becomes e^x, for x <= 0 or NaN, to a few units in the last place; 0 below -87.
template <int kLanes>
ACTCACHE_BODY void exponentiate(typename Register<kLanes>::Floats& x) {
    using Floats = typename Register<kLanes>::Floats;
    using Words = typename Register<kLanes>::Words;
    // Adding 1.5 * 2^23 leaves the nearest whole number in the lowest bits.
    const Floats shifted = x * 1.44269504f + 12582912.0f;
    const Floats whole = shifted - 12582912.0f;
    const Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * (rest * rest) + rest + 1.0f;
    Words bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    Floats power;
    std::memcpy(&power, &bits, sizeof power);
    const Floats found = sum * power;
    x = x < -87.0f ? Floats{} : found;
}

// One key head of one sequence, and where its queries, values and results lie.
struct Head {
    const float* query;
    const float* key;
    const float* value;
    float* out;
    std::int64_t length;
    std::int64_t n_queries;  // heads that read this key head
};

// What one thread needs beside its arguments, for sequences up to `longest`.
struct Workspace {
    Workspace(const AttentionParams& p, std::int64_t longest)
        : length(round_up(longest, kStep) + kStep / 2),
          width(round_up(p.value_width, kStep)),
          keys(static_cast<std::size_t>(p.key_width * length)),
          values(static_cast<std::size_t>(width == p.value_width ? 0 : longest * width)),
          weights(static_cast<std::size_t>(kRows * length)) {}

    std::int64_t length;  // no power of two, whose multiples would share a place in the cache
    std::int64_t width;
    std::vector<float> keys;     // [key_width, length]
    std::vector<float> values;   // [longest, width], where rows of values are no whole number of steps
    std::vector<float> weights;  // [kRows, length]
};

// weights[r, j] = scale * query[r] . key[j] for the keys in [first, last), whole steps.
template <int kLanes>
ACTCACHE_BODY void score(const float* const (&rows)[kRows], const Workspace& work, std::int64_t width, float scale,
                         std::int64_t first, std::int64_t last, float* weights) {
    using Floats = typename Register<kLanes>::Floats;
    for (std::int64_t j = first; j < last; j += 2 * kLanes) {
        Floats sums[kRows][2] = {};
        const float* keys = work.keys.data() + j;
        for (std::int64_t c = 0; c < width; ++c, keys += work.length) {
            Floats low, high;
            load(keys, low);
            load(keys + kLanes, high);
            for (std::int64_t r = 0; r < kRows; ++r) {
                sums[r][0] += rows[r][c] * low;
                sums[r][1] += rows[r][c] * high;
            }
        }
        for (std::int64_t r = 0; r < kRows; ++r) {
            store(sums[r][0] * scale, weights + r * work.length + j);
            store(sums[r][1] * scale, weights + r * work.length + j + kLanes);
        }
    }
}

// Scores in [first, last), whole steps, of which [begin, end) are seen, become weights that lack their division by the
// sum, which is returned; 0 for those not seen.
template <int kLanes>
ACTCACHE_BODY float soften(float* weights, std::int64_t first, std::int64_t last, std::int64_t begin,
                           std::int64_t end) {
    using Floats = typename Register<kLanes>::Floats;
    std::fill(weights + first, weights + begin, -std::numeric_limits<float>::infinity());
    std::fill(weights + end, weights + last, -std::numeric_limits<float>::infinity());
    Floats highest = Floats{} - std::numeric_limits<float>::infinity();
    for (std::int64_t j = first; j < last; j += kLanes) {
        Floats scores;
        load(weights + j, scores);
        highest = scores > highest ? scores : highest;
    }
    float lanes[kLanes];
    store(highest, lanes);
    const float most = *std::max_element(lanes, lanes + kLanes);
    Floats sums = {};
    for (std::int64_t j = first; j < last; j += kLanes) {
        Floats scores;
        load(weights + j, scores);
        scores -= most;
        exponentiate<kLanes>(scores);
        store(scores, weights + j);
        sums += scores;
    }
    store(sums, lanes);
    return std::accumulate(lanes, lanes + kLanes, 0.0f);
}

// out[r, c] = sum of weights[r, j] * values[j, c] over j in [first, last), over sums[r].
template <int kLanes>
ACTCACHE_BODY void mix(const float* values, std::int64_t stride, const Workspace& work, std::int64_t first,
                       std::int64_t last, const float (&sums)[kRows], std::int64_t width, std::int64_t n_rows,
                       float* out, std::int64_t out_stride) {
    using Floats = typename Register<kLanes>::Floats;
    for (std::int64_t c = 0; c < width; c += 2 * kLanes) {
        Floats mixed[kRows][2] = {};
        const float* row = values + first * stride + c;
        for (std::int64_t j = first; j < last; ++j, row += stride) {
            Floats low, high;
            load(row, low);
            load(row + kLanes, high);
            for (std::int64_t r = 0; r < kRows; ++r) {
                const float weight = work.weights[static_cast<std::size_t>(r * work.length + j)];
                mixed[r][0] += weight * low;
                mixed[r][1] += weight * high;
            }
        }
        for (std::int64_t r = 0; r < n_rows; ++r) {
            float columns[2 * kLanes];
            store(mixed[r][0] / sums[r], columns);
            store(mixed[r][1] / sums[r], columns + kLanes);
            const auto n = static_cast<std::size_t>(std::min<std::int64_t>(2 * kLanes, width - c));
            std::memcpy(out + r * out_stride + c, columns, n * sizeof(float));
        }
    }
}

template <int kLanes>
ACTCACHE_BODY void attend_body(const AttentionParams& p, const Head& head, Workspace& work) {
    for (std::int64_t j = 0; j < head.length; ++j) {
        const float* key = head.key + j * p.key_strides[0];
        for (std::int64_t c = 0; c < p.key_width; ++c)
            work.keys[static_cast<std::size_t>(c * work.length + j)] = key[c];
    }
    const std::int64_t used = round_up(head.length, kStep);
    for (std::int64_t c = 0; c < p.key_width; ++c) {
        float* keys = work.keys.data() + c * work.length;
        std::fill(keys + head.length, keys + used, 0.0f);
    }
    const float* values = head.value;
    std::int64_t stride = p.value_strides[0];
    if (!work.values.empty()) {
        for (std::int64_t j = 0; j < head.length; ++j) {
            float* row = work.values.data() + j * work.width;
            std::memcpy(row, values + j * stride, static_cast<std::size_t>(p.value_width) * sizeof(float));
            std::fill(row + p.value_width, row + work.width, 0.0f);
        }
        values = work.values.data();
        stride = work.width;
    }
    const std::int64_t out_stride = p.n_heads * p.value_width;
    for (std::int64_t q = 0; q < head.n_queries; ++q) {
        for (std::int64_t i = 0; i < head.length; i += kRows) {
            const std::int64_t n_rows = std::min(kRows, head.length - i);
            const std::int64_t end = i + n_rows;  // of the keys that any of these rows sees
            const std::int64_t begin = std::max<std::int64_t>(0, i + 1 - p.window);
            const std::int64_t first = begin / kStep * kStep, last = round_up(end, kStep);
            const float* rows[kRows];
            for (std::int64_t r = 0; r < kRows; ++r) {  // beyond the last one, that one again
                rows[r] = head.query + q * p.query_strides[1] + std::min(i + r, end - 1) * p.query_strides[0];
            }
            score<kLanes>(rows, work, p.key_width, p.scale, first, last, work.weights.data());
            float sums[kRows];
            for (std::int64_t r = 0; r < kRows; ++r) {
                const std::int64_t at = std::min(i + r, end - 1);
                sums[r] = soften<kLanes>(work.weights.data() + r * work.length, first, last,
                                         std::max<std::int64_t>(0, at + 1 - p.window), at + 1);
            }
            mix<kLanes>(values, stride, work, begin, end, sums, p.value_width, n_rows,
                        head.out + i * out_stride + q * p.value_width, out_stride);
        }
    }
}

#if defined(ACTCACHE_X86)
ACTCACHE_AVX2 void attend_avx2(const AttentionParams& p, const Head& head, Workspace& work) {
    attend_body<8>(p, head, work);
}
ACTCACHE_AVX512 void attend_avx512(const AttentionParams& p, const Head& head, Workspace& work) {
    attend_body<16>(p, head, work);
}
#endif

void attend_head(const AttentionParams& p, const Head& head, Workspace& work) {
#if defined(ACTCACHE_X86)
    if (isa() == Isa::kAvx512) return attend_avx512(p, head, work);
    if (isa() == Isa::kAvx2) return attend_avx2(p, head, work);
#endif
    attend_body<4>(p, head, work);
}

}  // namespace

void attend_cpu(const AttentionParams& params, int n_threads) {
    const auto& p = params;
    std::int64_t longest = 0;
    for (std::int64_t s = 0; s < p.n_sequences; ++s) longest = std::max(longest, p.offsets[s + 1] - p.offsets[s]);
    const std::int64_t n_queries = p.n_heads / p.n_key_heads;
    // What is read of keys and values is what it costs, by and large.
    const std::int64_t floats = p.n_tokens * p.n_heads * (p.key_width + p.value_width);
    const std::int64_t bytes = std::min(floats, kMaxBytes >> 12) * std::min<std::int64_t>(longest, 1024);
    // All memory is taken here: an exception within a thread would end the process.
    std::vector<Workspace> spaces(static_cast<std::size_t>(n_threads), Workspace(p, longest));
    std::atomic<std::size_t> n_taken{0};
    deal_out(p.n_sequences * p.n_key_heads, bytes, n_threads, [&](std::int64_t begin, std::int64_t end) {
        Workspace& work = spaces[n_taken++];
        for (std::int64_t task = begin; task < end; ++task) {
            const std::int64_t h = task % p.n_key_heads, start = p.offsets[task / p.n_key_heads];
            const Head head = {p.query + start * p.query_strides[0] + h * n_queries * p.query_strides[1],
                               p.key + start * p.key_strides[0] + h * p.key_strides[1],
                               p.value + start * p.value_strides[0] + h * p.value_strides[1],
                               p.out + (start * p.n_heads + h * n_queries) * p.value_width,
                               p.offsets[task / p.n_key_heads + 1] - start,
                               n_queries};
            attend_head(p, head, work);
        }
    });
}

}  // namespace actcache
