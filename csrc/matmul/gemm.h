// The packed GEMM behind matmul and matmul_all_reduce, over the threads that torch may use, and the
// launcher of matmul.
#pragma once

#include "cpu/kernel_table.h"
#include "runtime/tensors.h"

namespace commfuse {

// Checks x [rows, k] and packed weights, and fills all of GemmArgs but bias and out.
GemmArgs gemm_args(const at::Tensor& x, const at::Tensor& weights, int64_t n);

// Panels [begin, end) of the output.
void run_gemm(const GemmArgs& args, int64_t panel_begin, int64_t panel_end);

at::Tensor matmul(const at::Tensor& x, const at::Tensor& weights, int64_t n,
                  const std::optional<at::Tensor>& bias, bool silu_mul, int64_t out_columns,
                  bool out_float32);

}  // namespace commfuse
