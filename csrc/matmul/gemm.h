// The packed GEMM behind matmul and matmul_all_reduce, over the threads that torch may use.
#pragma once

#include "cpu/kernel_table.h"
#include "runtime/tensors.h"

namespace commfuse {

// Checks x [rows, k] and packed weights, and fills all of GemmArgs but bias and out.
GemmArgs gemm_args(const at::Tensor& x, const at::Tensor& weights, int64_t n);

// Panels [begin, end) of the output.
void run_gemm(const GemmArgs& args, int64_t panel_begin, int64_t panel_end);

}  // namespace commfuse
