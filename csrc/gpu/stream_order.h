// What a kernel may read before its predecessor has ended. Ours start early (launch.cuh), and a
// GEMM fetches its weights at once; only where the predecessor is a kernel of ours that writes them
// must it wait. (Other predecessors have ended when ours start, and so have the predecessors of
// ours.)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace commfuse::gpu {

struct Range {
  const void* begin;
  int64_t bytes;
};

// After each launch of a kernel of ours: what it writes besides workspaces.
void wrote(int device, cudaStream_t stream, std::initializer_list<Range> ranges);

// Whether nothing that may still be running in the stream writes there.
bool settled(int device, cudaStream_t stream, Range range);

}  // namespace commfuse::gpu
