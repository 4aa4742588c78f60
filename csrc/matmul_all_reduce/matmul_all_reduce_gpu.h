// The row-parallel layer of decoding between GPUs; knows no framework. The kernels:
// matmul_all_reduce_gpu.cuh.
#pragma once

#include "gpu/call_site.h"
#include "matmul/matmul_gpu.h"

namespace commfuse::gpu {

struct MatmulAllReduceArgs {
  MatmulGpuArgs matmul;     // plan.blocks at most the call site's max_blocks
  const void* bias;         // [n] or null, as the following; equal on all ranks
  const void* residual;     // [m, n]
  const void* norm_weight;  // [n]
  float eps;
  void* out;  // [m, n]
  void* y;    // [m, n], with norm_weight
  bool two_shot;
};

// Whether the workspace holds the tiles of [m, n].
bool matmul_all_reduce_fits(const Workspace& workspace, int64_t m, int64_t n);

// out = sum over ranks of x w^T, + bias, + residual; y = RMSNorm(out) norm_weight.
void matmul_all_reduce(const CallSite& site, const MatmulAllReduceArgs& args);

void load_matmul_all_reduce();

}  // namespace commfuse::gpu
