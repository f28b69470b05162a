// A linear layer of float32 by bfloat16 products: out[r, c] = bias[c] + sum over k of rows[r, k] * weight[c, k].
//
// CPUs with matrix tiles (Intel's AMX) multiply bfloat16 many times as fast as float32. A float32 has 24 significant
// bits, a bfloat16 has 8 and the same exponents: x = x0 + x1 + x2, each the bfloat16 nearest to what is left of x. Of the
// nine products of two such sums six are made; the other three are below 2^-23 of the whole. Products of bfloat16 are
// exact in float32, and sums are float32's: the result is as near to the true one as a product of float32 is. Where a
// block of weights is all zeros in x2, or in x1 and x2, products with those are left out, which changes no finite sum:
// weights that came as bfloat16 take three products; five, where 16 bits hold them (float16, some quantized ones).
//
// Unlike float32: what rounds to infinity as a bfloat16 (the last 0.4% of the range) is infinite; a result that an
// infinity goes into may be NaN; pieces below 2^-126 are 0, so that values below some 1e-33 lose digits.
// What a row becomes depends, bit for bit, on that row and the weights alone, not on other rows or threads.
#pragma once

#include <cstdint>

#include "gather.h"

namespace actcache {

struct LinearParams {
    const float* rows;    // [n_rows, n_in], the innermost stride is 1
    const float* weight;  // [n_out, n_in], contiguous
    const float* bias;    // [n_out], or null
    float* out;           // [n_rows, n_out], contiguous
    std::int64_t n_rows;
    std::int64_t n_in;
    std::int64_t n_out;
    std::int64_t row_stride;  // in floats
};

// Why these parameters cannot be used, or null.
inline const char* check(const LinearParams& p) {
    if (p.n_rows < 0 || p.n_in < 1 || p.n_out < 1 || p.row_stride < 0) {
        return "n_in and n_out must be at least 1, n_rows and row_stride must not be negative";
    }
    const auto fits = [](std::int64_t a, std::int64_t b) {
        return product_fits(static_cast<std::uint64_t>(a), static_cast<std::uint64_t>(b));
    };
    if (!fits(p.n_rows, p.n_out) || !fits(p.n_in, p.n_out) || !fits(p.n_rows, p.n_in) ||
        !fits(p.n_rows, p.row_stride)) {
        return "rows, weight and out must not exceed 2^60 floats";
    }
    const bool given = p.rows != nullptr && p.weight != nullptr && p.out != nullptr;
    return given || p.n_rows == 0 ? nullptr : "rows, weight and out must not be null";
}

// linear_cpu.cpp. Parameters must have passed check(). Without tiles (isa.h) the same sums are made by plain loops, far
// slower than a product of float32.
void linear_cpu(const LinearParams& params, int n_threads);

}  // namespace actcache
