// Which instruction set to use.
#include "isa.h"

#include <algorithm>
#include <atomic>

namespace actcache {
namespace {

std::atomic<Isa> widest{Isa::kAvx512};

Isa of_this_machine() {
#if defined(ACTCACHE_X86)
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
        return Isa::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi"))
        return Isa::kAvx2;
#endif
    return Isa::kPortable;
}

}  // namespace

Isa isa() {
    static const Isa found = of_this_machine();
    return std::min(found, widest.load(std::memory_order_relaxed));
}

void limit_isa(Isa limit) { widest.store(limit, std::memory_order_relaxed); }

}  // namespace actcache
