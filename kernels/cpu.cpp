// Which of the instruction sets that the library was compiled for this CPU and its operating system have.
#define HASTEN_SUPPORTED(name, test) \
    extern "C" __attribute__((visibility("default"))) int hasten_supported_##name() { return (test) != 0; }

#if defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#define HASTEN_BF16 (getauxval(AT_HWCAP2) & 1 << 14)  // HWCAP2_BF16, which older headers do not name
#elif defined(__APPLE__)
#include <sys/sysctl.h>
namespace {
int bf16() {
    int found = 0;
    size_t size = sizeof(found);
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found;
}
}  // namespace
#define HASTEN_BF16 bf16()
#else
#define HASTEN_BF16 0
#endif
HASTEN_SUPPORTED(neon_bf16, HASTEN_BF16)
HASTEN_SUPPORTED(neon, 1)
#else
HASTEN_SUPPORTED(scalar, 1)
#endif
#if defined(__x86_64__)
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
// Linux wants to be asked before a process uses the tiles: ARCH_REQ_XCOMP_PERM for their data.
#define HASTEN_TILE_PERMISSION (syscall(SYS_arch_prctl, 0x1023, 18) == 0)
#else
#define HASTEN_TILE_PERMISSION 0
#endif
#define HASTEN_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#define HASTEN_AVX512                                                                                              \
    (HASTEN_AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                      \
     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#define HASTEN_AMX                                                                                             \
    (HASTEN_AVX512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&            \
     __builtin_cpu_supports("amx-bf16") && HASTEN_TILE_PERMISSION)
HASTEN_SUPPORTED(avx2, HASTEN_AVX2)
HASTEN_SUPPORTED(avx512, HASTEN_AVX512)
HASTEN_SUPPORTED(avx512bf16, HASTEN_AVX512&& __builtin_cpu_supports("avx512bf16"))
HASTEN_SUPPORTED(amx, HASTEN_AMX)
#endif
