// All-gather between GPUs; knows no framework.
#pragma once

#include "cpu/dtypes.h"
#include "gpu/call_site.h"

namespace commfuse::gpu {

// Bytes of a rank's message that one call can carry.
int64_t all_gather_capacity(const Workspace& workspace, bool by_lines);

// out[r * stride ... + n] = x[n] of rank r, elements.
void all_gather(const CallSite& site, bool by_lines, DType dtype, const void* x, void* out,
                int64_t stride, int64_t n);

void load_all_gather();

}  // namespace commfuse::gpu
