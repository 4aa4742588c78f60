// top-k and top-p: the least logit that is drawn, by radix selection over all ranks.
#pragma once

#include "vocab_parallel_sample/sample_rounds.cuh"

namespace commfuse::gpu {

// Warp 0: the bin with which the sum reaches the target.
__device__ inline void find_bin(const Work& work, unsigned long long target, int bins) {
  constexpr int kEach = kBins / 32;
  unsigned long long own = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int bin = work.lane * kEach + i;
    if (bin < bins) own += work.shared.histogram[bin];
  }
  unsigned long long sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, sum, distance);
    if (work.lane >= distance) sum += other;
  }
  const unsigned reached = __ballot_sync(kAllLanes, sum >= target);
  if (work.lane == 0) work.shared.found = reached != 0;
  if (reached == 0 || work.lane != __ffs(reached) - 1) return;
  unsigned long long left = target - (sum - own);
  int bin = work.lane * kEach;
  for (; work.shared.histogram[bin] < left; ++bin) left -= work.shared.histogram[bin];
  work.shared.prefix = static_cast<uint32_t>(bin);
  work.shared.target = left;
}

// The least logit at or above which lie top_k tokens, or top_p of the mass: looked for among
// distances from the largest logit, in the order of the numbers' bits. The first histogram has a
// bin for each of the 255 nearest distances in bfloat16, about two powers of two, where the bound
// almost always is; few logits come to it. If it is not there, all 32 bits are looked through,
// eight at a time.
template <int kWorld, class T>
__device__ inline bool find_bound(Work& work, const T* logits, float largest, int64_t top_k,
                                  double top_p, bool by_mass, RowOptions& row) {
  constexpr int kFinest = std::is_same_v<T, float> ? 0 : std::is_same_v<T, __half> ? 8 : 16;
  const uint32_t top = key_of(largest);
  bool window = true;
  int shift = 16;
  uint32_t prefix = 0;
  unsigned long long target = 0;
  for (;;) {
    if (threadIdx.x < kBins) work.shared.histogram[threadIdx.x] = 0;
    if (threadIdx.x == 0) work.shared.total = 0;
    __syncthreads();
    unsigned long long total = 0;
    for_logits(work, logits, [&](const float (&x)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (!(x[i] >= row.bound)) continue;
        const uint32_t distance = top - key_of(x[i]);
        const unsigned long long mass = by_mass ? fixed(weight(x[i], largest, row.exponent)) : 1;
        if (window) {
          total += mass;
          if (distance >> 16 >= kBins - 1) continue;
        } else if (shift < 24 && distance >> (shift + 8) != prefix) {
          continue;
        }
        if (mass) atomicAdd(&work.shared.histogram[distance >> shift & (kBins - 1)], mass);
      }
    });
    if (window) add_to_total(work, total);
    __syncthreads();
    if (window && threadIdx.x == 0) work.shared.histogram[kBins - 1] = work.shared.total;
    __syncthreads();
    unsigned long long sum = 0;
    const unsigned long long mine = threadIdx.x < kBins ? work.shared.histogram[threadIdx.x] : 0;
    if (!exchange_packs<kWorld>(work, kBins, pack_of(mine),
                                [&](int, int, uint2 pack) { sum += word_of(pack); })) {
      return false;
    }
    if (threadIdx.x < kBins) work.shared.histogram[threadIdx.x] = sum;
    __syncthreads();
    if (window) {
      const unsigned long long all = work.shared.histogram[kBins - 1];
      target = by_mass ? wanted_mass(top_p, all) : wanted_tokens(top_k, all);
    }
    if (work.warp == 0) find_bin(work, target, window ? kBins - 1 : kBins);
    __syncthreads();
    const bool found = work.shared.found;
    const uint32_t bin = work.shared.prefix;
    const unsigned long long left = work.shared.target;
    __syncthreads();
    if (window && !found) {
      window = false;
      shift = 24;
      continue;
    }
    window = false;
    prefix = prefix << 8 | bin;
    target = left;
    if (shift <= kFinest) break;
    shift -= 8;
  }
  // The last of the distances that the bits found stand for: narrow types have no other there.
  const uint32_t distance = prefix << shift | ((1u << shift) - 1);
  row.bound = fmaxf(row.bound, value_of(distance < top ? top - distance : 0));
  return true;
}

}  // namespace commfuse::gpu
