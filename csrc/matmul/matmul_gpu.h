// y = x w^T on a GPU for few rows (M <= 64), as in decoding: the weights stream from memory once.
//
// Knows no framework. The kernels and how they work: matmul_gpu.cuh.
#pragma once

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/dtypes.h"

namespace commfuse::gpu {

constexpr int kMatmulGpuMaxRows = 64;

// Who computes what. A function of N, K and the number of blocks alone: M never enters, so that a
// row's bits do not depend on its batch.
//
// The output is cut into tiles of 64 columns. Every block computes `rounds` whole tiles; the
// remaining `rest` tiles, fewer than there are blocks, are cut along K into `splits` parts, and
// every block computes up to `parts_per_block` of these, before its whole tiles.
struct MatmulPlan {
  int tiles;
  int chunks;  // of 128 k each
  int rounds;
  int rest;
  int splits;
  int parts_per_block;
  int blocks;  // at most max_blocks; all must be able to run at the same time
};
MatmulPlan matmul_plan(int64_t n, int64_t k, int max_blocks);

// What the parts of a tile exchange. Counters come first, zeroed once by the owner and left zeroed
// by every call; sums follow, at the same place whatever the plan, so that calls of different
// shapes never leave sums where others count. One workspace serves one stream.
constexpr int kMatmulGpuCounters = 1024;  // more than blocks
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
