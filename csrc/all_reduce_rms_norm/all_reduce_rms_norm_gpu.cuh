// residual' = residual + sum over ranks of x; y = RMSNorm(residual') weight, between GPUs by
// flag-in-data lines. A block handles whole rows: it sends a row, adds what comes, and normalises
// while the row is in its registers.
#pragma once

#include "gpu/lines.cuh"

namespace commfuse::gpu {

// The sum of `value` over the block, in a fixed order; all threads call and get it.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  float sum = 0;
  for (int w = 0; w < warps; ++w) sum += scratch[w];
  __syncthreads();  // before the scratch is used again
  return sum;
}

// Rows [rows, n]; residual may be null. Two-shot cuts every row into parts, one for each rank.
template <class T, int kWorld, bool kTwoShot>
__global__ void __launch_bounds__(1024)
    all_reduce_rms_norm(const __grid_constant__ Workspace workspace,
                        const __grid_constant__ Announcement announcement, const T* x,
                        const T* residual, const T* weight, float eps, T* y, T* out, int rows,
                        int n) {
  constexpr int kHeld = 4;  // packs of a row that a thread keeps; more are read again
  __shared__ float scratch[32];
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if (!exchange.begin_block()) return;
  const int rank = exchange.rank(), world = exchange.world();
  const int packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const int parts = kTwoShot ? world : 1, part = (packs + parts - 1) / parts;
  // Lines of a row, in either hop.
  const auto line = [&](int owner, int source, int hop, int row, int pack) {
    return exchange.lines(owner, source) +
           ((hop * rows + row) * int64_t{part} + pack) * kLineStride;
  };

  // Everything is sent before anything is waited for.
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row<const T> from(x + int64_t{row} * n, n);
    for (int j = threadIdx.x; j < part; j += blockDim.x) {
#pragma unroll
      for (int p = 0; p < kWorld; ++p) {
        if (p < world && p != rank) {
          put_line(line(p, rank, 0, row, j), from.load(kTwoShot ? p * part + j : j),
                   exchange.flag());
        }
      }
    }
  }
  if (blockIdx.x == 0) exchange.announce_with_word(announcement);

  // The sum of pack j of this rank's part (of the whole row, in one shot), + residual.
  const auto summed = [&](int row, int j, uint2* total) {
    const int pack = kTwoShot ? rank * part + j : j;
    const uint2 own = Row<const T>(x + int64_t{row} * n, n).load(pack);
    uint2 addend = {0, 0};
    if (residual) addend = Row<const T>(residual + int64_t{row} * n, n).load(pack);
    Line lines[kWorld];
    if (!take_from_peers<kWorld>(
            exchange, 0, [&](int s) { return line(rank, s, 0, row, j); }, lines))
      return false;
    Floats<T> sum = sum_of<T>(exchange, lines, own);
    if (residual) sum.add(addend);
    *total = sum.pack();
    return true;
  };

  bool alive = true;
  if constexpr (kTwoShot) {
    for (int row = blockIdx.x; row < rows && alive; row += gridDim.x) {
      const Row<T> to(out + int64_t{row} * n, n);
      for (int j = threadIdx.x; j < part && alive; j += blockDim.x) {
        uint2 total;
        if (!(alive = summed(row, j, &total))) break;
#pragma unroll
        for (int p = 0; p < kWorld; ++p) {
          if (p < world && p != rank) put_line(line(p, rank, 1, row, j), total, exchange.flag());
        }
        to.store(rank * part + j, total);
      }
    }
  }

  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row<T> to(out + int64_t{row} * n, n);
    uint2 held[kHeld];
    float squares = 0;
    if constexpr (kTwoShot) {
      // A thread holds a pack of every part: kWorld of them for the first stretch of its row.
      for (int j = threadIdx.x; j < part && alive; j += blockDim.x) {
        Line lines[kWorld];
        alive = take_from_peers<kWorld>(
            exchange, 1, [&](int d) { return line(rank, d, 1, row, j); }, lines);
        if (!alive) break;
#pragma unroll
        for (int d = 0; d < kWorld; ++d) {
          if (d >= world || d * part + j >= packs) continue;
          const uint2 total = d == rank ? to.load(d * part + j) : lines[d].pack();
          if (d != rank) to.store(d * part + j, total);
          squares += Floats<T>(total).squares();
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int j = threadIdx.x + k * blockDim.x;
        if (j >= packs || !alive) continue;
        if (!(alive = summed(row, j, &held[k]))) continue;
        to.store(j, held[k]);
        squares += Floats<T>(held[k]).squares();
      }
      for (int j = threadIdx.x + kHeld * blockDim.x; j < packs && alive; j += blockDim.x) {
        uint2 total;
        if (!(alive = summed(row, j, &total))) break;
        to.store(j, total);
        squares += Floats<T>(total).squares();
      }
    }
    const float mean = block_sum(squares, scratch) / static_cast<float>(n);
    const float scale = 1.0f / sqrtf(mean + eps);
    const Row<const T> factor(weight, n);
    const Row<T> normalised(y + int64_t{row} * n, n);
    // Whoever stored a pack of the row loads it again: no other thread's stores are read.
    if constexpr (kTwoShot) {
      for (int j = threadIdx.x; j < part && alive; j += blockDim.x) {
#pragma unroll
        for (int d = 0; d < kWorld; ++d) {
          const int pack = d * part + j;
          if (d >= world || pack >= packs) continue;
          Floats<T> value(to.load(pack));
          value.scale(scale, factor.load(pack));
          normalised.store(pack, value.pack());
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int j = threadIdx.x + k * blockDim.x;
        if (j >= packs || !alive) continue;
        Floats<T> value(held[k]);
        value.scale(scale, factor.load(j));
        normalised.store(j, value.pack());
      }
      for (int j = threadIdx.x + kHeld * blockDim.x; j < packs && alive; j += blockDim.x) {
        Floats<T> value(to.load(j));
        value.scale(scale, factor.load(j));
        normalised.store(j, value.pack());
      }
    }
  }
  if (!alive) return;
  if (blockIdx.x == 0 && !exchange.await_words(announcement.tag)) return;
  exchange.finish();
}

// y = RMSNorm(x) weight, row by row: behind an all-reduce in bulk.
template <class T>
__global__ void __launch_bounds__(512)
    rms_norm_rows(const T* x, const T* weight, float eps, T* y, int rows, int n) {
  __shared__ float scratch[32];
  wait_for_predecessor();
  const int packs = (n + kPackElements<T> - 1) / kPackElements<T>;
  const Row<const T> factor(weight, n);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row<const T> from(x + int64_t{row} * n, n);
    const Row<T> to(y + int64_t{row} * n, n);
    float squares = 0;
    for (int j = threadIdx.x; j < packs; j += blockDim.x)
      squares += Floats<T>(from.load(j)).squares();
    const float mean = block_sum(squares, scratch) / static_cast<float>(n);
    const float scale = 1.0f / sqrtf(mean + eps);
    for (int j = threadIdx.x; j < packs; j += blockDim.x) {
      Floats<T> value(from.load(j));
      value.scale(scale, factor.load(j));
      to.store(j, value.pack());
    }
  }
}

}  // namespace commfuse::gpu
