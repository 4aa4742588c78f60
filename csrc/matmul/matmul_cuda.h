// The decode GEMM on tensors, for launchers.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "matmul/matmul_gpu.h"

namespace commfuse::gpu {

// Whether it takes these: few rows, two bytes an element.
bool matmul_serves(const at::Tensor& x);

// Everything about x [m, k] and w [n, k] on this device and stream, with the workspace;
// claimed_percent: see matmul_plan.
MatmulGpuArgs matmul_args(const at::Tensor& x, const at::Tensor& w, int max_blocks,
                          int claimed_percent, cudaStream_t stream);

}  // namespace commfuse::gpu
