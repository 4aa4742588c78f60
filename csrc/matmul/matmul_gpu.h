// y = x w^T on a GPU for few rows (M <= 64), as in decoding: the weights stream from memory once.
//
// Knows no framework. The kernels and how they work: matmul_gpu.cuh.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/dtypes.h"
#include "matmul/matmul_plan.h"

namespace commfuse::gpu {

constexpr int kMatmulGpuMaxRows = 64;

// What blocks exchange. Counters come first, zeroed once by the owner and left zeroed by every
// call; sums follow, at the same place whatever the plan, so that calls of different shapes never
// leave sums where others count. One workspace serves one stream.
constexpr int kClaims = kMostRest;  // the counter of claims, behind those of tiles, in its own line
constexpr int kMatmulGpuCounters = kMostRest + 32;
size_t matmul_gpu_workspace_bytes(const MatmulPlan& plan);

struct MatmulGpuArgs {
  const void* x;    // [m, k]
  const void* w;    // [n, k]
  int64_t m, n, k;  // 1 <= m <= kMatmulGpuMaxRows
  DType dtype;      // bfloat16 or float16; sums are float32
  MatmulPlan plan;
  void* workspace;  // 16-byte aligned
  // The weights may be fetched while the previous kernel in the stream still runs: it does not
  // write them (gpu/stream_order.h).
  bool weights_early;
};

// y [m, n] = x w^T + bias, where bias [n] may be null.
void matmul(const MatmulGpuArgs& args, const void* bias, void* y, cudaStream_t stream);

void load_matmul();

}  // namespace commfuse::gpu
