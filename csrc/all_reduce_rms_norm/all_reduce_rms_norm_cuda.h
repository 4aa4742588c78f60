// An all-reduce and the RMSNorm behind it, for launchers.
#pragma once

#include "all_reduce/all_reduce_cuda.h"
#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"

namespace commfuse::gpu {

// RMSNorm of the sum of all ranks' x, + the residual; any number of rows, in as many launches as it
// takes; two ranks or more.
inline void all_reduce_rms_norm_all(GpuCall& call, const Descriptor& descriptor,
                                    const RMSNormArgs& a) {
  const bool behind_gemm = call.behind_gemm;
  all_reduce_all(call, descriptor, a.dtype, a.x, a.residual, a.out, a.rows * a.n);
  RMSNormArgs norm = a;
  norm.x = a.out;
  norm.residual = norm.out = nullptr;
  rms_norm(norm, call.stream, behind_gemm);
}

}  // namespace commfuse::gpu
