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

enum class AllReduceRMSNorm { by_lines, by_rows };

// Rows that one launch can carry; 0: not even one.
int64_t all_reduce_rms_norm_capacity(const Workspace& workspace, AllReduceRMSNorm algorithm,
                                     DType dtype, int64_t n);

// One launch.
void all_reduce_rms_norm(const CallSite& site, AllReduceRMSNorm algorithm, const RMSNormArgs& args);

// y = RMSNorm(out) weight alone, where out holds the sum already.
void rms_norm(const RMSNormArgs& args, int max_blocks, cudaStream_t stream);

void load_all_reduce_rms_norm();

}  // namespace commfuse::gpu
