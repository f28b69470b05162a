// Row gather on the CPU: whole runs by memcpy, strided rows element by element, rows dealt out to threads in order.
#include <algorithm>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "gather.h"

namespace actcache {
namespace {

// Starting a thread takes as long as copying some tens of KiB; with a share of 1 MiB that is a few percent.
constexpr std::int64_t kBytesPerThread = std::int64_t{1} << 20;

template <std::size_t kBytes>
void copy_strided(const GatherParams& p, std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
        const unsigned char* from = source_row(p, i);
        unsigned char* to = destination_row(p, i);
        for (std::int64_t c = 0; c < p.n_cols; ++c, from += p.col_stride, to += kBytes) std::memcpy(to, from, kBytes);
    }
}

void copy_rows(const GatherParams& p, std::int64_t begin, std::int64_t end) {
    if (rows_are_runs(p)) {
        const auto n = static_cast<std::size_t>(row_bytes(p));
        for (std::int64_t i = begin; i < end; ++i) std::memcpy(destination_row(p, i), source_row(p, i), n);
        return;
    }
    switch (p.elem_bytes) {
        case 1: return copy_strided<1>(p, begin, end);
        case 2: return copy_strided<2>(p, begin, end);
        case 4: return copy_strided<4>(p, begin, end);
        default: return copy_strided<8>(p, begin, end);
    }
}

}  // namespace

void gather_rows_cpu(const GatherParams& params, int n_threads) {
    const std::int64_t bytes = params.n_rows * row_bytes(params);
    if (bytes == 0) return;
    const std::int64_t useful = std::min<std::int64_t>({n_threads, bytes / kBytesPerThread, params.n_rows});
    if (useful <= 1) return copy_rows(params, 0, params.n_rows);
    const std::int64_t share = (params.n_rows + useful - 1) / useful;
    std::vector<std::thread> threads;
    threads.reserve(static_cast<std::size_t>(useful));
    std::int64_t begin = share;  // the first share is this thread's own
    try {
        for (; begin < params.n_rows; begin += share) {
            threads.emplace_back(copy_rows, params, begin, std::min(begin + share, params.n_rows));
        }
    } catch (const std::exception&) {
        // No more threads or no memory for one: what was not dealt out is copied here, which needs neither.
        copy_rows(params, begin, params.n_rows);
    }
    copy_rows(params, 0, share);
    for (auto& thread : threads) thread.join();
}

}  // namespace actcache
