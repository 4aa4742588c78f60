// y = RMSNorm(x) weight, row by row: behind an all-reduce that has added the residual.
//
// Two launches, since an all-reduce is fastest spread over all multiprocessors, and a row belongs
// to few. (Measured, W = 2, 4, 8, one row of 16 KB, us: a block that sends, adds and normalises its
// row 7.6, 12.8, 22; a cluster of blocks 5.0, 7.1, 20.7; the all-reduce alone 2.3, 3.2, 6.0. A
// multiprocessor stores some 25 bytes a clock.)
#pragma once

#include "gpu/protocol.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

// The sum of `value` over the block, in a fixed order; all threads call and get it. Once only: the
// threads of a second call may still be reading what those of the first have left.
__device__ __forceinline__ float block_sum(float value, float (&partial)[32]) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const auto warp_sum = [](float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    return value;
  };
  const float sum = warp_sum(value);
  if (lane == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  return warp_sum(lane < warps ? partial[lane] : 0);
}

constexpr int kNormThreads = 512;

// Of a block that normalises rows of as many bytes: the order of the sum depends on it.
inline int norm_threads(int64_t row_bytes) {
  const int64_t units = (row_bytes + 15) / 16;
  int threads = 64;
  while (threads < kNormThreads && threads < units) threads *= 2;
  return threads;
}

// A block for each row.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 2)
    rms_norm_rows(const T* x, const T* weight, float eps, T* y, int n, bool successor_early) {
  constexpr int kHeld = 2;  // units of the row that a thread keeps; more are read again
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  __shared__ float partial[32];
  wait_for_predecessor(successor_early);
  const int units = (n + kElements - 1) / kElements;
  const int64_t offset = int64_t{blockIdx.x} * n;
  const Units<const T> from(x + offset, n), factor(weight, n);
  const Units<T> to(y + offset, n);
  const auto at = [&](int k) { return static_cast<int>(threadIdx.x + k * blockDim.x); };

  uint4 held[kHeld], by[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) >= units) continue;
    held[k] = from.load(at(k));
    by[k] = factor.load(at(k));
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) < units) squares += squares_of<T>(held[k]);
  }
  for (int j = at(kHeld); j < units; j += blockDim.x) squares += squares_of<T>(from.load(j));
  const float mean = block_sum(squares, partial) / static_cast<float>(n);
  const float scale = 1.0f / sqrtf(mean + eps);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) < units) to.store(at(k), scaled<T>(held[k], scale, by[k]));
  }
  for (int j = at(kHeld); j < units; j += blockDim.x) {
    to.store(j, scaled<T>(from.load(j), scale, factor.load(j)));
  }
}

}  // namespace commfuse::gpu
