// The choice among the ways to sum and normalise between GPUs, for launchers.
#pragma once

#include "all_reduce/all_reduce_cuda.h"
#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"

namespace commfuse::gpu {

// Any number of rows, in as many launches as it takes; two ranks or more.
void all_reduce_rms_norm_all(GpuCall& call, const Descriptor& descriptor, const RMSNormArgs& args);

}  // namespace commfuse::gpu
