// The core without Python, for the sanitizers: built by test_planes_sanitized.py with all of csrc's CPU sources.
// Buffers are of exactly the size that each function may touch, on the heap, so that one byte too far is an error.
// Exits 0 and prints how many checks passed, or aborts at the first that did not. With the argument `rows` only what
// has threads runs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "attention.h"
#include "gather.h"
#include "isa.h"
#include "linear.h"
#include "planes.h"
#include "scatter.h"

namespace {

using namespace actcache;
using Bytes = std::vector<unsigned char>;

std::size_t n_checks = 0;
std::mt19937 rng(0);

void check(bool holds, const char* what) {
    ++n_checks;
    if (holds) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::abort();
}

// Exactly these bytes, begun at an odd address of their own allocation now and then: no slack on either side.
class Exact {
   public:
    explicit Exact(const Bytes& bytes) : off_(rng() % 2), data_(new unsigned char[bytes.size() + off_]) {
        if (!bytes.empty()) std::memcpy(get(), bytes.data(), bytes.size());
    }
    unsigned char* get() { return data_.get() + off_; }

   private:
    std::size_t off_;
    std::unique_ptr<unsigned char[]> data_;
};

Bytes random_words(std::size_t n, unsigned n_exponents) {
    Bytes words(2 * n);
    for (std::size_t i = 0; i < n; ++i) {
        // Halving probabilities, as exponents have them; or, with 256, anything.
        unsigned exponent = rng() % 256;
        if (n_exponents < 256) {
            exponent = 120;
            while (exponent < 120 + n_exponents && rng() % 2 != 0) ++exponent;
        }
        const auto word = static_cast<std::uint16_t>((rng() & 0x807f) | exponent << 7);
        std::memcpy(words.data() + 2 * i, &word, 2);
    }
    return words;
}

Bytes encoded(const Bytes& words, std::size_t row_words) {
    const std::size_t n = words.size() / 2;
    Exact source(words);
    Exact target(Bytes(encoded_bound(n)));
    const std::size_t size = encode_words(source.get(), n, row_words, target.get());
    check(size <= encoded_bound(n), "a chunk is within its bound");
    Bytes chunk(target.get(), target.get() + size);

    Exact exponents{Bytes(n)};
    Exact rests{Bytes(n)};
    split_words(source.get(), n, exponents.get(), rests.get());
    Exact merged{Bytes(2 * n)};
    merge_words(exponents.get(), rests.get(), n, merged.get());
    check(n == 0 || std::memcmp(merged.get(), words.data(), 2 * n) == 0, "merge undoes split");
    return chunk;
}

// The words, or nothing where the chunk is refused.
bool decodes(const Bytes& chunk, std::size_t n, Bytes* words) {
    Exact source(chunk);
    Exact target{Bytes(2 * n, 0xee)};
    const char* refusal = decode_words(source.get(), chunk.size(), n, target.get());
    words->assign(target.get(), target.get() + 2 * n);
    if (refusal != nullptr) check(*words == Bytes(2 * n, 0xee), "a refused chunk writes nothing");
    return refusal == nullptr;
}

void codec() {
    Bytes out;
    std::vector<std::size_t> sizes = {4095, 4096, 4097, 8191, 12293};
    for (std::size_t n = 0; n < 300; ++n) sizes.push_back(n);
    for (const std::size_t n : sizes) {
        for (const std::size_t row_words : {std::size_t{1}, std::size_t{5}, std::size_t{64}, std::size_t{257}}) {
            for (const unsigned n_exponents : {0u, 4u, 14u, 40u, 256u}) {
                const Bytes words = random_words(n, n_exponents);
                check(decodes(encoded(words, row_words), n, &out) && out == words, "there and back");
            }
        }
    }
    Bytes all(2 * 65536);
    for (std::size_t i = 0; i < 65536; ++i) {
        all[2 * i] = static_cast<unsigned char>(i & 0xff);
        all[2 * i + 1] = static_cast<unsigned char>(i >> 8);
    }
    check(decodes(encoded(all, 1), 65536, &out) && out == all, "all words");
    Bytes mixed = random_words(5 * 65536, 6);
    mixed.insert(mixed.end(), all.begin(), all.end());
    check(decodes(encoded(mixed, 64), 6 * 65536, &out) && out == mixed, "all words behind others");
}

void damage() {
    Bytes out;
    for (const unsigned n_exponents : {6u, 256u}) {
        Bytes words = random_words(300, n_exponents);
        const Bytes tail = random_words(4, 256);
        words.insert(words.end(), tail.begin(), tail.end());
        const std::size_t n = words.size() / 2;
        const Bytes chunk = encoded(words, 5);
        for (std::size_t size = 0; size < chunk.size(); ++size) {
            check(!decodes(Bytes(chunk.begin(), chunk.begin() + static_cast<std::ptrdiff_t>(size)), n, &out),
                  "cut off");
        }
        for (std::size_t bit = 0; bit < 8 * chunk.size(); ++bit) {
            Bytes flipped = chunk;
            flipped[bit / 8] = static_cast<unsigned char>(flipped[bit / 8] ^ 1u << bit % 8);
            const bool decoded = decodes(flipped, n, &out);
            check(!decoded || bit >= 8 * kHeaderBytes, "a flip in the header is refused");
        }
        for (int i = 0; i < 20000; ++i) {
            Bytes flipped = chunk;
            for (int k = 0; k < 3; ++k) {
                // Two in three within the first 60 bytes, where sizes and bases are.
                const std::size_t at = rng() % (k < 2 ? 60 : chunk.size());
                flipped[at] = static_cast<unsigned char>(rng());
            }
            decodes(flipped, n, &out);
        }
    }
}

void rows() {
    for (int i = 0; i < 3000; ++i) {
        const std::int64_t elem = std::int64_t{1} << rng() % 4;
        const std::int64_t n_table = 1 + static_cast<std::int64_t>(rng() % 7);
        const std::int64_t n_cols = static_cast<std::int64_t>(rng() % 70);
        const std::int64_t col = elem * (1 + static_cast<std::int64_t>(rng() % 3 == 0));
        const std::int64_t row = n_cols * col + static_cast<std::int64_t>(rng() % 9);
        const std::int64_t span = (n_table - 1) * row + (n_cols > 0 ? (n_cols - 1) * col + elem : 0);
        Bytes table(static_cast<std::size_t>(span));
        for (auto& byte : table) byte = static_cast<unsigned char>(rng());
        std::vector<std::int64_t> ids;
        for (std::int64_t id = 0; id < n_table; ++id) {
            if (rng() % 2 != 0) ids.insert(ids.begin() + static_cast<std::ptrdiff_t>(rng() % (ids.size() + 1)), id);
        }
        const auto n = static_cast<std::int64_t>(ids.size());
        Exact source(table);
        Exact gathered{Bytes(static_cast<std::size_t>(n * n_cols * elem))};
        const GatherParams gather = {source.get(), ids.data(), gathered.get(), n_table, n, n_cols, row, col, elem};
        check(first_bad_id(gather) == n, "ids are in range");
        const int n_threads = 1 + static_cast<int>(rng() % 3);
        gather_rows_cpu(gather, n_threads);

        Exact target{Bytes(static_cast<std::size_t>(span))};
        const ScatterParams scatter = {gathered.get(), ids.data(), target.get(), n_table, n, n_cols, row, col, elem};
        scatter_rows_cpu(scatter, n_threads);
        for (const std::int64_t id : ids) {
            for (std::int64_t c = 0; c < n_cols; ++c) {
                const std::int64_t at = id * row + c * col;
                check(std::memcmp(source.get() + at, target.get() + at, static_cast<std::size_t>(elem)) == 0,
                      "a row is back");
            }
        }
    }
    // Shares of threads: more than a MiB each.
    const Bytes table = random_words(3 << 20, 6);
    std::vector<std::int64_t> ids(3072);
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(ids.size() - 1 - i);
    Bytes out(table.size());
    gather_rows_cpu({table.data(), ids.data(), out.data(), 3072, 3072, 1024, 2048, 2, 2}, 3);
    Bytes back(table.size());
    scatter_rows_cpu({out.data(), ids.data(), back.data(), 3072, 3072, 1024, 2048, 2, 2}, 3);
    check(back == table, "threads share the rows");
}

// Each result against the sum that defines it, over sequences of their own lengths, one of them empty.
void attention() {
    for (int round = 0; round < 60; ++round) {
        const auto up_to = [](unsigned most) { return static_cast<std::int64_t>(1 + rng() % most); };
        const std::int64_t n_key_heads = up_to(2), n_heads = n_key_heads * up_to(3);
        const std::int64_t widths[2] = {up_to(40), up_to(70)};
        std::vector<std::int64_t> offsets{0, up_to(40)};
        offsets.push_back(offsets.back());
        offsets.push_back(offsets.back() + up_to(9));
        const std::int64_t n = offsets.back(), window = round % 2 == 0 ? n : up_to(12);
        const auto random = [](std::int64_t size) {
            std::unique_ptr<float[]> floats(new float[static_cast<std::size_t>(size)]);
            for (std::int64_t i = 0; i < size; ++i) floats[i] = static_cast<float>(rng() % 2001) / 1000.0f - 1.0f;
            return floats;
        };
        const auto query = random(n * n_heads * widths[0]), key = random(n * n_key_heads * widths[0]);
        const auto value = random(n * n_key_heads * widths[1]), out = random(n * n_heads * widths[1]);
        // Queries by token, keys by head.
        const AttentionParams params = {query.get(),
                                        key.get(),
                                        value.get(),
                                        out.get(),
                                        offsets.data(),
                                        3,
                                        n,
                                        n_heads,
                                        n_key_heads,
                                        widths[0],
                                        widths[1],
                                        {n_heads * widths[0], widths[0]},
                                        {widths[0], n * widths[0]},
                                        {n_key_heads * widths[1], widths[1]},
                                        window,
                                        0.25f};
        check(actcache::check(params) == nullptr, "good attention passes");
        attend_cpu(params, 1 + round % 3);
        for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
            for (std::int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
                for (std::int64_t h = 0; h < n_heads; ++h) {
                    const std::int64_t g = h / (n_heads / n_key_heads);
                    std::vector<double> mixed(static_cast<std::size_t>(widths[1]), 0.0);
                    double sum = 0;
                    for (std::int64_t j = std::max(offsets[s], i + 1 - window); j <= i; ++j) {
                        double score = 0;
                        for (std::int64_t c = 0; c < widths[0]; ++c) {
                            score += static_cast<double>(query[(i * n_heads + h) * widths[0] + c]) *
                                     static_cast<double>(key[(g * n + j) * widths[0] + c]);
                        }
                        const double weight = std::exp(0.25 * score);
                        sum += weight;
                        for (std::int64_t c = 0; c < widths[1]; ++c) {
                            mixed[static_cast<std::size_t>(c)] +=
                                weight * static_cast<double>(value[(j * n_key_heads + g) * widths[1] + c]);
                        }
                    }
                    for (std::int64_t c = 0; c < widths[1]; ++c) {
                        const double found = static_cast<double>(out[(i * n_heads + h) * widths[1] + c]);
                        check(std::abs(found - mixed[static_cast<std::size_t>(c)] / sum) < 1e-5, "attention");
                    }
                }
            }
        }
    }
}

// Each result against the sum that defines it; more than is laid out at a time either way, in rows and steps.
void linear() {
    for (int round = 0; round < 12; ++round) {
        const auto up_to = [](unsigned most) { return static_cast<std::int64_t>(1 + rng() % most); };
        const std::int64_t n_rows = up_to(70), n_in = round % 4 == 0 ? 760 + up_to(40) : up_to(70), n_out = up_to(70);
        const std::int64_t stride = n_in + static_cast<std::int64_t>(rng() % 3);
        const auto random = [](std::int64_t size) {
            std::unique_ptr<float[]> floats(new float[static_cast<std::size_t>(size)]);
            for (std::int64_t i = 0; i < size; ++i) floats[i] = static_cast<float>(rng() % 2001) / 1000.0f - 1.0f;
            return floats;
        };
        // The last row ends where its numbers end.
        const auto rows = random((n_rows - 1) * stride + n_in), weight = random(n_out * n_in);
        if (round % 3 == 1) std::fill_n(weight.get(), n_out * n_in, 0.75f);  // pieces are left out
        const auto bias = random(n_out), out = random(n_rows * n_out);
        const bool with_bias = round % 2 == 0;
        const LinearParams params = {
            rows.get(), weight.get(), with_bias ? bias.get() : nullptr, out.get(), n_rows, n_in, n_out, stride};
        check(actcache::check(params) == nullptr, "a good linear layer passes");
        linear_cpu(params, 1 + round % 3);
        for (std::int64_t r = 0; r < n_rows; ++r) {
            for (std::int64_t c = 0; c < n_out; ++c) {
                double sum = with_bias ? static_cast<double>(bias[c]) : 0.0;
                for (std::int64_t k = 0; k < n_in; ++k) {
                    sum += static_cast<double>(rows[r * stride + k]) * static_cast<double>(weight[c * n_in + k]);
                }
                check(std::abs(static_cast<double>(out[r * n_out + c]) - sum) < 1e-3, "a linear layer");
            }
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    const bool only_rows = argc > 1 && std::strcmp(argv[1], "rows") == 0;
    for (const Isa widest : {Isa::kAvx512, Isa::kAvx2, Isa::kPortable}) {
        limit_isa(widest);
        if (isa() != widest) continue;
        if (!only_rows) codec();
        if (!only_rows) damage();
        rows();
        attention();
        linear();
    }
    std::printf("%zu checks\n", n_checks);
    return 0;
}
