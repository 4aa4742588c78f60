// Rounds of an exchange between the blocks of one number on all ranks, and sums over a block of
// threads.
#pragma once

#include "vocab_parallel_sample/sample_work.cuh"

namespace commfuse::gpu {

// Lines of one source: of each block of threads the rounds of its rows, in two halves; behind them
// what plain rows exchange.
constexpr int64_t kRoundLines = kBins;
constexpr int64_t kRoundBytes = kRoundLines * kLineStride;
constexpr int64_t kPlainOffset = kMaxGrid * 2 * kRoundBytes;
static_assert(kPlainOffset < kLineBytes);

// The block: thread t < n puts a pack; take(t, source, pack) sees everybody's, in rank order.
template <int kWorld, class Take>
__device__ inline bool exchange_packs(Work& work, int n, uint2 mine, Take take) {
  bool failed = false;
  const int t = threadIdx.x;
  if constexpr (kWorld == 1) {
    if (t < n) take(t, 0, mine);
  } else {
    if (t < n) {
      const int64_t at = (blockIdx.x * 2 + (work.round & 1)) * kRoundBytes + t * kLineStride;
      const int rank = work.exchange.rank(), world = work.exchange.world();
#pragma unroll
      for (int p = 0; p < kWorld; ++p) {
        if (p < world && p != rank) {
          put_line(work.exchange.lines(p, rank) + at, mine, work.exchange.flag());
        }
      }
      Line lines[kWorld];
      failed = !take_from_peers<kWorld>(
          work.exchange, 0, [&](int s) { return work.exchange.lines(rank, s) + at; }, lines);
      if (!failed) {
#pragma unroll
        for (int s = 0; s < kWorld; ++s) {
          if (s < world) take(t, s, s == rank ? mine : lines[s].pack());
        }
      }
      // R14: the lines of this round are empty before anything of the next one is seen, and a
      // peer that has seen it may write here in the one after that.
      __threadfence_system();
    }
    ++work.round;
  }
  return !__syncthreads_or(failed);
}

__device__ inline uint2 pack_of(unsigned long long x) {
  return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
}
__device__ inline uint2 pack_of(double x) {
  return pack_of(static_cast<unsigned long long>(__double_as_longlong(x)));
}
__device__ inline unsigned long long word_of(uint2 pack) {
  return static_cast<unsigned long long>(pack.y) << 32 | pack.x;
}

__device__ inline float block_largest(const Work& work, float m) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    m = max_or_nan(m, __shfl_xor_sync(kAllLanes, m, distance));
  }
  if (work.lane == 0) work.shared.warp_largest[work.warp] = m;
  __syncthreads();
  m = work.shared.warp_largest[work.lane];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    m = max_or_nan(m, __shfl_xor_sync(kAllLanes, m, distance));
  }
  __syncthreads();
  return m;
}
// Into shared.total, which must be zero; visible after a barrier.
__device__ inline void add_to_total(const Work& work, unsigned long long x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  if (work.lane == 0) atomicAdd(&work.shared.total, x);
}

// f(x) for every eight logits of a row.
template <class T, class F>
__device__ inline void for_logits(const Work& work, const T* logits, F f) {
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2;
  for (int64_t base = threadIdx.x * kVector; base < work.draws.columns;
       base += kUnroll * kSampleThreads * kVector) {
    Vector8<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t column = base + u * kSampleThreads * kVector;
      const int64_t valid = work.draws.columns - column;
      vectors[u].load(logits + column,
                      valid <= 0        ? 0
                      : valid < kVector ? static_cast<int>(valid)
                                        : kVector,
                      aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[kVector];
      vectors[u].floats(x);
      f(x);
    }
  }
}

}  // namespace commfuse::gpu
