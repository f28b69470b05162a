// Which instruction set to use.
#include "isa.h"

#include <algorithm>
#include <atomic>

#if defined(ACTCACHE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool tiles_of_this_machine() {
#if defined(ACTCACHE_AMX)
    // Asked of the processor itself: not every compiler's __builtin_cpu_supports() knows these names.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned kTiles = 1u << 24 | 1u << 22, kAvx512Bf16 = 1u << 5;  // AMX-TILE and AMX-BF16
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTiles) != kTiles) return false;
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || (eax & kAvx512Bf16) == 0) return false;
    // Linux's "Using XSTATE features in user space applications"; glibc names neither.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

bool has_tiles() {
    static const bool found = of_this_machine() == Isa::kAvx512 && tiles_of_this_machine();
    return found && isa() == Isa::kAvx512;
}

Isa isa() {
    static const Isa found = of_this_machine();
    return std::min(found, widest.load(std::memory_order_relaxed));
}

void limit_isa(Isa limit) { widest.store(limit, std::memory_order_relaxed); }

}  // namespace actcache
