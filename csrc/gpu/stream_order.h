// What a kernel may read before its predecessors have ended. Ours start early (launch.cuh), and a
// GEMM fetches its weights at once; only where a kernel of ours that may still be running writes
// them must it wait. (Others have ended when ours start.)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>

namespace commfuse::gpu {

struct Range {
  const void* begin;
  int64_t bytes;
};

// When a kernel allows its successor to start (allow_successor).
enum class Allows { at_once, when_predecessors_have_ended };

// After each launch of a kernel of ours: what it writes besides workspaces.
void wrote(int device, cudaStream_t stream, Allows allows, std::initializer_list<Range> ranges);

// Whether nothing that may still be running in the stream writes there.
bool settled(int device, cudaStream_t stream, Range range);

}  // namespace commfuse::gpu
