// Rows are copied out of the slot as they come, and normalised on the way where that is asked for:
// a block of rows for each block of the grid.
#pragma once

#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.cuh"
#include "gpu/message.cuh"

namespace commfuse::gpu {

template <class T>
struct RecvRows {
  T* x;                  // [rows, columns], as y
  const T* norm_weight;  // [columns] or null
  float eps;
  T* y;
};

constexpr int kRecvThreads = kNormThreads;

template <class T>
__device__ __forceinline__ void copy_rows(const T* slot, T* x, int64_t n) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int units = static_cast<int>((n + kElements - 1) / kElements);
  const Units<const T> from(slot, n);
  const Units<T> to(x, n);
  move_units(
      units, [&](int j) { return from.load_uncached(j); },
      [&](int j, uint4 unit) { to.store(j, unit); });
}

template <class T>
__global__ void __launch_bounds__(kRecvThreads, 2)
    recv_rows(const __grid_constant__ GpuMessage message, BlockRange range,
              const __grid_constant__ RecvRows<T> to) {
  __shared__ float shared[SumOfSquares::kMostSteps * kNormThreads / SumOfSquares::kUnits];
  MessageEnd end(message);
  wait_for_predecessor();
  if (!end.begin_block()) return;
  const RowBlocks& blocks = message.blocks;
  for (int b = range.begin + blockIdx.x; b < range.end; b += gridDim.x) {
    if (!end.await_block(b)) return;
    const int64_t first = blocks.begin(b), last = blocks.end(b), n = message.columns;
    if (!to.norm_weight) {
      copy_rows(end.received_row<T>(first), to.x + first * n, (last - first) * n);
    }
    for (int64_t row = first; to.norm_weight && row < last; ++row) {
      const Units<const T> from(end.received_row<T>(row), n);
      const Units<T> x(to.x + row * n, n);
      normalise_row<T>(
          to.norm_weight, to.eps, to.y + row * n, static_cast<int>(n), shared,
          [&](int j) { return from.load_uncached(j); },
          [&](int j, uint4 unit) { x.store(j, unit); });
    }
    end.finish_read();
  }
}

// A thread for each block of rows.
__global__ void __launch_bounds__(kMessageBlocks)
    await_words(const __grid_constant__ GpuMessage message, BlockRange range) {
  MessageEnd end(message);
  wait_for_predecessor();
  const int block = range.begin + static_cast<int>(threadIdx.x);
  // What fails here is reported, and the kernel behind this one leaves.
  if (end.begin() && block < range.end) end.await_word(block);
}

}  // namespace commfuse::gpu
