// An all-reduce and the RMSNorm behind it, for launchers.
#pragma once

#include "all_reduce/all_reduce_cuda.h"
#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"

namespace commfuse::gpu {

struct RMSNormArgs {
  DType dtype;
  const void* x;         // [rows, n]
  const void* residual;  // [rows, n], equal on all ranks, or null
  const void* weight;    // [n]
  float eps;
  void* y;    // [rows, n]
  void* out;  // [rows, n] residual'
  int64_t rows, n;
};

// Any number of rows, in as many launches as it takes; two ranks or more.
inline void all_reduce_rms_norm_all(GpuCall& call, const Descriptor& descriptor,
                                    const RMSNormArgs& a) {
  const bool behind_gemm = call.behind_gemm;
  all_reduce_all(call, descriptor, a.dtype, a.x, a.residual, a.out, a.rows * a.n);
  rms_norm(a.dtype, a.out, a.weight, a.eps, a.y, a.rows, a.n, call.stream, behind_gemm);
}

}  // namespace commfuse::gpu
