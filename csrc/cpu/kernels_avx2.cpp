#if defined(__x86_64__)
// Before the pragma: their functions carry target attributes of their own.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/isa.h"

#define COMMFUSE_ISA avx2
COMMFUSE_TARGET_BEGIN("avx2,fma,f16c")
#include "cpu/vec_avx2.h"
// clang-format off: the kernels need the Vec above
#include "cpu/kernels.inc"
// clang-format on
COMMFUSE_TARGET_END
#endif
