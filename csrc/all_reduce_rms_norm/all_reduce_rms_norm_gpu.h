// RMSNorm behind an all-reduce between GPUs, or with a residual; knows no framework. The kernel:
// all_reduce_rms_norm_gpu.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/dtypes.h"

namespace commfuse::gpu {

struct RMSNormArgs {
  DType dtype;
  const void* x;         // [rows, n]
  const void* residual;  // [rows, n] or null
  const void* weight;    // [n]
  float eps;
  void* y;          // [rows, n] RMSNorm(x + residual) weight
  void* out;        // [rows, n] x + residual, rounded, which is what is normalised; or null
  int64_t rows, n;  // below 2^31
};

// successor_early: see wait_for_predecessor (gpu/protocol.cuh).
void rms_norm(const RMSNormArgs& args, cudaStream_t stream, bool successor_early = false);

void load_rms_norm();

}  // namespace commfuse::gpu
