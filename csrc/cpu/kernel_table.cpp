#include "cpu/kernel_table.h"

#include "cpu/isa.h"

#ifdef COMMFUSE_WITH_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace commfuse {
namespace {

#ifdef COMMFUSE_WITH_AMX
// Whether the processor has tiles and the kernel lets this process use them: their state is large,
// so that it must be asked for, once for all threads.
bool tiles_granted() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID 7.0, EDX
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || ~edx & (kBf16 | kTile)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const KernelTable& amx_table() {
  static const KernelTable table = [] {
    KernelTable made = avx512_bf16::table;
    made.name = "amx";
    made.gemm = amx::gemm;
    return made;
  }();
  return table;
}
#endif

#if defined(__x86_64__)
const KernelTable& avx512_fma_table() {
  static const KernelTable table = [] {
    KernelTable made = avx512_bf16::table;
    made.name = "avx512_fma";
    made.gemm = avx512::table.gemm;
    return made;
  }();
  return table;
}
#endif

bool runs(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
  if (name == "avx512") {
    return runs("avx2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (name == "avx512_bf16") return runs("avx512") && __builtin_cpu_supports("avx512bf16");
  if (name == "avx512_fma") return runs("avx512_bf16");
#endif
#ifdef COMMFUSE_WITH_AMX
  if (name == "amx") return runs("avx512_bf16") && tiles_granted();
#endif
  return name == "plain";
}

const KernelTable& table_of(const std::string& name) {
#ifdef COMMFUSE_WITH_AMX
  if (name == "amx") return amx_table();
#endif
#if defined(__x86_64__)
  if (name == "avx512_bf16") return avx512_bf16::table;
  if (name == "avx512_fma") return avx512_fma_table();
  if (name == "avx512") return avx512::table;
  if (name == "avx2") return avx2::table;
#endif
  return plain::table;
}

// The faster way to multiply where there are instructions for bfloat16 and no tiles. Intel's cores
// take 2 cycles for a dot product of bfloat16 pairs, and in that time 4 fused multiply-adds, which
// are twice as many products (measured on Emerald Rapids).
const char* fastest_avx512_bf16() {
#if defined(__x86_64__)
  if (__builtin_cpu_is("intel")) return "avx512_fma";
#endif
  return "avx512_bf16";
}

const KernelTable& choose() {
  if (const char* wanted = std::getenv("COMMFUSE_CPU_ISA"); wanted && *wanted) {
    if (!runs(wanted)) {
      throw std::invalid_argument(
          std::string("COMMFUSE_CPU_ISA=") + wanted +
          ": this processor cannot run it; use amx, avx512_bf16, avx512_fma, "
          "avx512, avx2 or plain, as far as `commfuse doctor` lists them");
    }
    return table_of(wanted);
  }
  for (const char* name : {"amx", fastest_avx512_bf16(), "avx512", "avx2"}) {
    if (runs(name)) return table_of(name);
  }
  return plain::table;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace commfuse
