// The best block of tokens among those of a row that a warp sees, and the token inside it.
#pragma once

#include "vocab_parallel_sample/sample_candidates.cuh"
#include "vocab_parallel_sample/sample_gpu.h"

namespace commfuse::gpu {

constexpr int kKept = 16;  // blocks of tokens per half warp whose keys are computed together

// One warp's share of the blocks of tokens first ... first + n of a row: those steps of two blocks
// whose turn it is, when dealing begins with warp `turn`. The result is in every lane.
template <class T, bool kNormaliser, class Weights>
__device__ __forceinline__ Best scan(const T* logits, int64_t columns, int first, int n, int turn,
                                     const RowOptions& row, const Weights& weights) {
  constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int half = lane >> 4, part = lane & 15;
  const int steps = (n + 1) / 2;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  Best best = Best::none();
  int count = 0;
  // Of the count-th block of this half warp: kept by its count-th lane.
  float kept_largest = 0, kept_sum = 0, kept_normaliser = 0;
  int kept_block = 0;

  const auto flush = [&] {
    if (part < count && kept_block < first + n) {
      double key = kept_largest;
      if (!row.greedy && (!Weights::kRelativeToBlock || is_finite(kept_largest))) {
        const double base =
            Weights::kRelativeToBlock ? double{kept_largest} * double{row.scale} : 0.0;
        // A sum that is NaN, as of a draft's distribution, gives a NaN.
        key = kept_sum == 0
                  ? kNoKey
                  : base + std::log(double{kept_sum} / row.noise_of(kept_block).exponential());
      }
      if (key != kNoKey) best.take(key, kept_block);
      if constexpr (kNormaliser) best.add(kept_largest, kept_normaliser);
    }
    count = 0;
  };

  // The next steps' logits are on their way while these are worked on.
  Vector8<T> vectors[kUnroll], next[kUnroll];
  const auto fetch = [&](int j) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int block = first + 2 * (j + u * kSampleWarps) + half;
      const int64_t column = int64_t{block} * kBlock + part * kVector;
      const int64_t valid = block < first + n ? columns - column : 0;
      next[u].load(logits + column, valid < kVector ? static_cast<int>(valid) : kVector, aligned);
    }
  };
  int j = (warp - turn) & (kSampleWarps - 1);
  if (j < steps) fetch(j);
  for (; j < steps; j += kUnroll * kSampleWarps) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = next[u];
    if (j + kUnroll * kSampleWarps < steps) fetch(j + kUnroll * kSampleWarps);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (j + u * kSampleWarps >= steps) break;
      const int block = first + 2 * (j + u * kSampleWarps) + half;
      float x[kVector], w[kVector];
      vectors[u].floats(x);
      const float m = half_warp_largest(largest_of(x));
      float sum = 0, normaliser = 0;
      if (!row.greedy) {
        const int64_t column = int64_t{block} * kBlock + part * kVector;
        weights.of(x, column, m, row, w);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum += w[i];
        sum = half_warp_sum(sum);
        // Without any weight the largest may be -inf, and the weights NaN.
        if (Weights::kRelativeToBlock && !(m >= row.bound)) sum = 0;
      }
      if constexpr (kNormaliser) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) normaliser += weight(x[i], m, kLog2E);
        normaliser = half_warp_sum(normaliser);
        if (!(m >= kNoBound)) normaliser = 0;
      }
      if (part == count) {
        kept_largest = m;
        kept_sum = sum;
        kept_normaliser = normaliser;
        kept_block = block;
      }
      if (++count == kKept) flush();
    }
  }
  flush();
  best.reduce<kNormaliser>(32);
  return best;
}

// One warp: the token of a block of tokens at which the weights have added up to a fraction of
// their sum, or the first that has the largest logit.
template <class T, class Weights>
__device__ __forceinline__ Candidate token_of(const T* logits, int64_t columns, int64_t vocab_begin,
                                              const Best& best, const RowOptions& row,
                                              const Weights& weights) {
  Candidate found = {best.key, kNobody, -infinity(), best.largest, best.sum};
  if (best.block == kNobody || !is_finite(best.key)) return found;
  const int lane = threadIdx.x & 31;
  const int64_t column = int64_t{best.block} * kBlock + (lane & 15) * kVector;
  const int64_t valid = columns - column;
  Vector8<T> vector;
  vector.load(logits + column, valid < kVector ? static_cast<int>(valid) : kVector,
              reinterpret_cast<uintptr_t>(logits) % 16 == 0);
  float x[kVector], w[kVector];
  vector.floats(x);
  const float m = half_warp_largest(largest_of(x));
  int mine = -1,
      last = -1;  // of this lane's eight: the one that is reached; the last with a weight
  if (row.greedy) {
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) mine = x[i] == m ? i : mine;
  } else {
    weights.of(x, column, m, row, w);
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += w[i];
    double before = sum;  // of the lanes up to this one, of each half warp, which do the same
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      const double other = __shfl_up_sync(kAllLanes, before, distance, 16);
      if ((lane & 15) >= distance) before += other;
    }
    const double total = __shfl_sync(kAllLanes, before, 15);
    before -= sum;
    const double wanted = row.noise_of(best.block).second * total;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      before += w[i];
      if (w[i] > 0) {
        last = i;
        if (mine < 0 && before > wanted) mine = i;
      }
    }
  }
  unsigned lanes = __ballot_sync(kAllLanes, mine >= 0) & 0xffffu;
  int source = __ffs(lanes) - 1;
  if (lanes == 0) {
    // Rounding: the fraction was not reached at all.
    lanes = __ballot_sync(kAllLanes, last >= 0) & 0xffffu;
    source = 31 - __clz(lanes);
    mine = last;
  }
  float logit = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) logit = i == mine ? x[i] : logit;
  const int index = __shfl_sync(kAllLanes, mine, source);
  found.logit = __shfl_sync(kAllLanes, logit, source);
  found.id =
      static_cast<int32_t>(vocab_begin + int64_t{best.block} * kBlock + source * kVector + index);
  return found;
}

}  // namespace commfuse::gpu
