// One loop body, compiled for several instruction sets and chosen when it runs: what a build for any x86-64 needs to
// use the registers of the machine it meets. Other architectures compile the portable body alone.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define ACTCACHE_X86 1
#define ACTCACHE_AVX2 __attribute__((target("avx2,fma,popcnt,bmi")))
#define ACTCACHE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi")))
#endif

// Matrix tiles, for which Linux asks to be asked; compilers know them from these on.
#if defined(ACTCACHE_X86) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define ACTCACHE_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#endif

#if defined(__GNUC__)
#define ACTCACHE_BODY inline __attribute__((always_inline))
#else
#define ACTCACHE_BODY inline
#endif

namespace actcache {

enum class Isa { kPortable, kAvx2, kAvx512 };

// isa.cpp. The widest instruction set of this machine, not above what limit_isa() allows.
Isa isa();

// Whether matrix tiles multiply bfloat16 here: AVX-512 in use, AMX and AVX512-BF16 present, and leave given by Linux,
// which is asked for it at the first call.
bool has_tiles();

// For tests: no wider than this from now on. Not for use beside a running call.
void limit_isa(Isa widest);

}  // namespace actcache
