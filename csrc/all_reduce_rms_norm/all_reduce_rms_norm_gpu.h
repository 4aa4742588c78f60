// RMSNorm behind an all-reduce between GPUs; knows no framework. The kernel:
// all_reduce_rms_norm_gpu.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/dtypes.h"

namespace commfuse::gpu {

// y [rows, n] = RMSNorm(x) weight; rows and n below 2^31. successor_early: see
// wait_for_predecessor (gpu/protocol.cuh).
void rms_norm(DType dtype, const void* x, const void* weight, float eps, void* y, int64_t rows,
              int64_t n, cudaStream_t stream, bool successor_early = false);

void load_rms_norm();

}  // namespace commfuse::gpu
