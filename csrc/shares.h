// Rows dealt out to threads in order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace actcache {

// Starting a thread takes as long as copying some tens of KiB; with a share of 1 MiB that is a few percent.
constexpr std::int64_t kBytesPerThread = std::int64_t{1} << 20;

// Calls work(begin, end) for ranges that make up 0..n_rows, on up to n_threads threads, fewer where there are few
// bytes.
template <typename Work>
void deal_out(std::int64_t n_rows, std::int64_t bytes, int n_threads, const Work& work) {
    if (bytes == 0) return;
    const std::int64_t useful = std::min<std::int64_t>({n_threads, bytes / kBytesPerThread, n_rows});
    if (useful <= 1) return work(0, n_rows);
    const std::int64_t share = (n_rows + useful - 1) / useful;
    std::vector<std::thread> threads;
    std::int64_t begin = share;  // the first share is this thread's own
    try {
        threads.reserve(static_cast<std::size_t>(useful));
        for (; begin < n_rows; begin += share) {
            threads.emplace_back(work, begin, std::min(begin + share, n_rows));
        }
    } catch (const std::exception&) {
        // No more threads or no memory for one: what was not dealt out is done here, which needs neither.
        work(begin, n_rows);
    }
    work(0, share);
    for (auto& thread : threads) thread.join();
}

}  // namespace actcache
