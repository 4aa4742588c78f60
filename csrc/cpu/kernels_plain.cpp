#include "cpu/isa.h"

#define COMMFUSE_ISA plain
#include "cpu/vec_plain.h"
// clang-format off: the kernels need the Vec above
#include "cpu/kernels.inc"
// clang-format on
