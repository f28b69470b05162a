// Causal softmax attention of sequences that lie one after the other, each to itself, in float32.
//
// For short sequences by the dozen: a call for each of them costs more than its arithmetic. A token's query sees the
// keys of its own sequence up to its own place, or the last `window` of them.
#pragma once

#include <cstdint>

#include "gather.h"

namespace actcache {

struct AttentionParams {
    const float* query;           // [n_tokens, n_heads, key_width], of any strides but the innermost, which is 1
    const float* key;             // [n_tokens, n_key_heads, key_width], likewise
    const float* value;           // [n_tokens, n_key_heads, value_width], likewise
    float* out;                   // [n_tokens, n_heads, value_width], contiguous
    const std::int64_t* offsets;  // [n_sequences + 1], from 0 to n_tokens, none smaller than the one before
    std::int64_t n_sequences;
    std::int64_t n_tokens;
    std::int64_t n_heads;  // a multiple of n_key_heads: head h reads key head h / (n_heads / n_key_heads)
    std::int64_t n_key_heads;
    std::int64_t key_width;
    std::int64_t value_width;
    std::int64_t query_strides[2];  // in floats: from token to token, from head to head
    std::int64_t key_strides[2];
    std::int64_t value_strides[2];
    std::int64_t window;  // keys that a query sees, its own among them; at least 1
    float scale;          // of the products of query and key
};

// Why these parameters cannot be used, or null.
inline const char* check(const AttentionParams& p) {
    if (p.n_sequences < 0 || p.n_tokens < 0) return "counts must not be negative";
    if (p.n_heads < 1 || p.n_key_heads < 1 || p.n_heads % p.n_key_heads != 0) {
        return "n_heads must be a multiple of n_key_heads, both at least 1";
    }
    if (p.key_width < 1 || p.value_width < 1 || p.window < 1) return "widths and window must be at least 1";
    const auto row = [](std::int64_t n_heads, std::int64_t width) {
        return product_fits(static_cast<std::uint64_t>(n_heads), static_cast<std::uint64_t>(width))
                   ? static_cast<std::uint64_t>(n_heads * width)
                   : std::uint64_t{1} << 60;
    };
    const auto n_tokens = static_cast<std::uint64_t>(p.n_tokens);
    if (!product_fits(n_tokens, row(p.n_heads, p.key_width)) ||
        !product_fits(n_tokens, row(p.n_heads, p.value_width))) {
        return "query and out must not exceed 2^60 floats";
    }
    if (p.offsets == nullptr) return "offsets must not be null";
    if (p.offsets[0] != 0 || p.offsets[p.n_sequences] != p.n_tokens) return "offsets must run from 0 to n_tokens";
    for (std::int64_t i = 0; i < p.n_sequences; ++i) {
        if (p.offsets[i + 1] < p.offsets[i]) return "offsets must not decrease";
    }
    const bool given = p.query != nullptr && p.key != nullptr && p.value != nullptr && p.out != nullptr;
    return given || p.n_tokens == 0 ? nullptr : "query, key, value and out must not be null";
}

// attention_cpu.cpp. Parameters must have passed check().
void attend_cpu(const AttentionParams& params, int n_threads);

}  // namespace actcache
