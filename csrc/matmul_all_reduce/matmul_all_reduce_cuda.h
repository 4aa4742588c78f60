// The choice between the two ways of a row-parallel layer between GPUs.
#pragma once

#include "gpu/attachment.h"
#include "matmul_all_reduce/matmul_all_reduce_gpu.h"

namespace commfuse::gpu {

// Whether tiles are sent while the GEMM computes; else an all-reduce follows the GEMM. The same on
// every rank: K may differ between ranks, so it has no say. One rank has nobody to send to.
inline bool sends_tiles(const Attachment& gpu, DType dtype, int64_t m, int64_t n) {
  return gpu.workspace().world > 1 && dtype != DType::float32 && m > 0 && n > 0 &&
         m >= gpu.fused_rows.fewest && m <= gpu.fused_rows.most &&
         matmul_all_reduce_fits(gpu.workspace(), m, n);
}

}  // namespace commfuse::gpu
