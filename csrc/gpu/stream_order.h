// What a kernel may read before its predecessors have ended. Ours start early (launch.cuh), and a
// GEMM fetches its weights at once; only where one of the two ops of ours before it writes them
// must it wait: a GEMM, and the exchange behind it, each of which leaves a record. (Those before
// that GEMM have ended: protocol.cuh, wait_for_predecessor.)
//
// Nothing is known of other libraries' kernels, nor of those in Triton. One that writes weights
// must not stand directly before a GEMM on them: what it has stored is only sure to be visible once
// it has ended as a whole, and if it lets its successor start early, it may even still be storing.
// Any launch of an ordinary kernel in between is enough; docs/kernels.md says so to users. x and
// everything else is read when the predecessor has ended, whatever it is.
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
