#include "cpu/isa.h"

#ifdef COMMFUSE_WITH_AMX
// See kernels_avx512.cpp.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
// Before the pragma: their functions carry target attributes of their own.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

// The bias, the activation and the rounding are those of avx512_bf16, whose inline functions are
// compiled here for exactly what kernels_avx512_bf16.cpp compiles them for.
#define COMMFUSE_ISA avx512_bf16
#define COMMFUSE_BF16_INSTRUCTIONS
COMMFUSE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#include "cpu/vec_avx512.h"
// clang-format off: the kernels need the Vec above
#include "matmul/matmul_cpu.h"
// clang-format on
COMMFUSE_TARGET_END

COMMFUSE_TARGET_BEGIN(
    "amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#include "matmul/matmul_amx.h"

namespace commfuse::amx {
namespace {

void gemm_any(const GemmArgs& a, int64_t panel_begin, int64_t panel_end) {
  if (a.dtype == DType::bfloat16) return gemm_bfloat16(a, panel_begin, panel_end);
  avx512_bf16::table.gemm(a, panel_begin, panel_end);
}

}  // namespace

extern void (*const gemm)(const GemmArgs&, int64_t, int64_t) = gemm_any;

}  // namespace commfuse::amx
COMMFUSE_TARGET_END
#endif
