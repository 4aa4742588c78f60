// What every launch of a kernel that communicates needs.
#pragma once

#include <cuda_runtime_api.h>

#include "gpu/workspace.h"

namespace commfuse::gpu {

struct CallSite {
  const Workspace& workspace;
  const Descriptor& descriptor;
  int max_blocks;  // that surely run at the same time, on every rank
  cudaStream_t stream;
  bool behind_gemm = false;  // of ours: see wait_for_predecessor (protocol.cuh)
};

}  // namespace commfuse::gpu
