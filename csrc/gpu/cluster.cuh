// Blocks that run on neighbouring multiprocessors and read each other's shared memory (Hopper). On
// other GPUs every block is a cluster of its own.
#pragma once

#include <cooperative_groups.h>

namespace commfuse::gpu {

class Cluster {
 public:
  __device__ int rank() const {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
    return 0;
#endif
  }
  __device__ int size() const {
#if __CUDA_ARCH__ >= 900
    return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
    return 1;
#endif
  }
  // All threads of all blocks.
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    cooperative_groups::this_cluster().sync();
#endif
  }
  // The sum of the blocks' values in a fixed order; all threads call and get it. value: the same in
  // all threads of a block; place: in shared memory, the same in all blocks, and not used again
  // before the sum after the next.
  __device__ float sum(float value, float* place) const {
#if __CUDA_ARCH__ >= 900
    if (size() == 1) return value;
    if (threadIdx.x == 0) *place = value;
    sync();
    const int lane = threadIdx.x % 32;
    float all =
        lane < size() ? *cooperative_groups::this_cluster().map_shared_rank(place, lane) : 0;
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2) all += __shfl_xor_sync(0xffffffffu, all, offset);
    return __shfl_sync(0xffffffffu, all, 0);
#else
    return value;
#endif
  }
};

constexpr int kMostBlocksOfCluster = 8;  // that every GPU with clusters has

}  // namespace commfuse::gpu
