// Reduce-scatter between GPUs; knows no framework.
#pragma once

#include "cpu/dtypes.h"
#include "gpu/call_site.h"

namespace commfuse::gpu {

// Bytes of a chunk that one call can carry.
int64_t reduce_scatter_capacity(const Workspace& workspace, bool by_lines);

// out[n] = sum over ranks of x[rank * stride ... + n], elements.
void reduce_scatter(const CallSite& site, bool by_lines, DType dtype, const void* x, int64_t stride,
                    void* out, int64_t n);

void load_reduce_scatter();

}  // namespace commfuse::gpu
