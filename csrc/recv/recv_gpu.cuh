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
  constexpr int kElements = 16 / static_cast<int>(sizeof(T)), kHeld = 4;
  const int64_t units = (n + kElements - 1) / kElements;
  const Units<const T> from(slot, n);
  const Units<T> to(x, n);
  // So many loads are on the way at once.
  for (int64_t j = threadIdx.x; j < units; j += kHeld * blockDim.x) {
    uint4 held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (j + k * blockDim.x < units) held[k] = from.load_uncached(j + k * blockDim.x);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (j + k * blockDim.x < units) to.store(j + k * blockDim.x, held[k]);
    }
  }
}

// Copies a row and normalises it: the bits of rms_norm_rows.
template <class T>
__device__ __forceinline__ void normalise_row(const T* slot, const RecvRows<T>& to, int64_t row,
                                              int n, float* shared) {
  // Units of the row that a thread keeps; more are read again.
  constexpr int kHeld = SumOfSquares::kMostSteps;
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  const int units = (n + kElements - 1) / kElements;
  const Units<const T> from(slot, n), factor(to.norm_weight, n);
  const Units<T> x(to.x + row * n, n), y(to.y + row * n, n);
  const auto at = [&](int k) { return static_cast<int>(threadIdx.x + k * blockDim.x); };

  uint4 held[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) < units) held[k] = from.load_uncached(at(k));
  }
  SumOfSquares squares(shared);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    float own = 0;
    if (at(k) < units) {
      x.store(at(k), held[k]);
      own = squares_of<T>(held[k]);
    }
    squares.note(k, own);
  }
  squares.add(kHeld);
  for (int first = kHeld * blockDim.x; first < units; first += blockDim.x) {
    const int j = first + threadIdx.x;
    float own = 0;
    if (j < units) {
      const uint4 unit = from.load_uncached(j);
      x.store(j, unit);
      own = squares_of<T>(unit);
    }
    squares.note(0, own);
    squares.add(1);
  }
  const float mean = squares.total() / static_cast<float>(n);
  const float scale = 1.0f / sqrtf(mean + to.eps);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    if (at(k) < units) y.store(at(k), scaled<T>(held[k], scale, factor.load(at(k))));
  }
  for (int j = at(kHeld); j < units; j += blockDim.x) {
    y.store(j, scaled<T>(from.load_uncached(j), scale, factor.load(j)));
  }
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
      normalise_row(end.received_row<T>(row), to, row, static_cast<int>(n), shared);
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
