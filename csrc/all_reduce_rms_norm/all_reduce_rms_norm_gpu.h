// All-reduce, residual and RMSNorm between GPUs; knows no framework.
#pragma once

#include "cpu/dtypes.h"
#include "gpu/call_site.h"

namespace commfuse::gpu {

struct RMSNormArgs {
  DType dtype;
  const void* x;         // [rows, n]
  const void* residual;  // [rows, n], equal on all ranks, or null
  const void* weight;    // [n]
  float eps;
  void* y;    // [rows, n]
  void* out;  // [rows, n] residual'
  int rows, n;
};

// Rows that one call by lines can carry; 0: not even one.
int64_t rms_norm_rows_by_lines(const Workspace& workspace, DType dtype, int64_t n, bool two_shot);

// One launch, rows by lines.
void all_reduce_rms_norm(const CallSite& site, const RMSNormArgs& args, bool two_shot);

// y = RMSNorm(out) weight alone, where out holds the sum already.
void rms_norm(const RMSNormArgs& args, int max_blocks, cudaStream_t stream);

void load_all_reduce_rms_norm();

}  // namespace commfuse::gpu
