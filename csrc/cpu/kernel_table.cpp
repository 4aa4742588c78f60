#include "cpu/kernel_table.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace commfuse {
namespace {

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
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return name == "plain";
}

const KernelTable& table_of(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx512") return avx512::table;
  if (name == "avx2") return avx2::table;
#endif
  return plain::table;
}

const KernelTable& choose() {
  if (const char* wanted = std::getenv("COMMFUSE_CPU_ISA"); wanted && *wanted) {
    if (!runs(wanted)) {
      throw std::invalid_argument(std::string("COMMFUSE_CPU_ISA=") + wanted +
                                  ": this processor cannot run it; use avx512 (with BF16), avx2 "
                                  "or plain, as far as `commfuse doctor` lists them");
    }
    return table_of(wanted);
  }
  for (const char* name : {"avx512", "avx2"}) {
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
