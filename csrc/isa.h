// One loop body, compiled for several instruction sets and chosen when it runs: what a build for any x86-64 needs to
// use the registers of the machine it meets. Other architectures compile the portable body alone.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define ACTCACHE_X86 1
#define ACTCACHE_AVX2 __attribute__((target("avx2,fma,popcnt,bmi")))
#define ACTCACHE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi")))
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

// For tests: no wider than this from now on. Not for use beside a running call.
void limit_isa(Isa widest);

}  // namespace actcache
