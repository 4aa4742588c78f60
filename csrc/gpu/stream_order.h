// What a kernel may read before its predecessors have ended. Ours start early (launch.cuh), and a
// GEMM fetches its weights at once; only where one of the two ops of ours before it writes them
// must it wait: a GEMM, and the exchange behind it, each of which leaves a record. (Those before
// that GEMM have ended, and so have predecessors that are not ours: protocol.cuh,
// wait_for_predecessor.)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace commfuse::gpu {

struct Range {
  const void* begin;
  int64_t bytes;
};

// After the launches of each op of ours, in order: what it writes besides workspaces.
void wrote(int device, cudaStream_t stream, std::initializer_list<Range> ranges);

// Whether nothing that may still be running in the stream writes there.
bool settled(int device, cudaStream_t stream, Range range);

}  // namespace commfuse::gpu
