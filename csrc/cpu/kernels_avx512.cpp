#if defined(__x86_64__)
// GCC 12 takes the deliberately undefined operands inside its own intrinsics for mistakes
// (https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
// Before the pragma: their functions carry target attributes of their own.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/isa.h"

#define COMMFUSE_ISA avx512
COMMFUSE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "cpu/vec_avx512.h"
// clang-format off: the kernels need the Vec above
#include "cpu/kernels.inc"
// clang-format on
COMMFUSE_TARGET_END
#endif
