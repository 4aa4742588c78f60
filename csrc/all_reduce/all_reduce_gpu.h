// All-reduce between GPUs; knows no framework. The kernels: all_reduce_gpu.cuh.
#pragma once

#include "cpu/dtypes.h"
#include "gpu/call_site.h"

namespace commfuse::gpu {

enum class AllReduce { one_shot, two_shot, bulk };

// Bytes that one call can carry.
int64_t all_reduce_capacity(const Workspace& workspace, AllReduce algorithm);

// out[n] = sum over ranks of x[n], + residual[n] unless that is null; out may be x. In bulk, x is
// copied to this rank's workspace.staging() first, unless it lies there.
void all_reduce(const CallSite& site, AllReduce algorithm, DType dtype, const void* x,
                const void* residual, void* out, int64_t n);

// peers[r]: the tensor of rank r, aligned to 16 bytes and of whole units of 16 bytes.
void all_reduce_in_place(const CallSite& site, DType dtype, void* const* peers, int64_t n);

void load_all_reduce();

}  // namespace commfuse::gpu
