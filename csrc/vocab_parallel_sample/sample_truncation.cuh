// top-k and top-p: the least logit that is drawn, by radix selection over all ranks.
#pragma once

#include "vocab_parallel_sample/sample_rounds.cuh"

namespace commfuse::gpu {

// f(x) for eight logits each of the blocks of tokens that are listed.
template <class T, class F>
__device__ inline void for_listed(const Work& work, const T* logits, F f) {
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2, kStep = kSampleThreads / 16;
  const int n = work.listed_count();
  const int part = threadIdx.x & 15;
  for (int base = static_cast<int>(threadIdx.x) / 16; base < n; base += kUnroll * kStep) {
    Vector8<T> vectors[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kStep;
      const int64_t column = i < n ? int64_t{work.listed(i)} * kBlock + part * kVector : 0;
      const int64_t valid = i < n ? work.draws.columns - column : 0;
      vectors[u].load(logits + column, valid < kVector ? static_cast<int>(valid) : kVector,
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

// The block: an empty histogram, and total.
__device__ inline void clear_histogram(const Work& work) {
  if (threadIdx.x < kBins) work.shared.histogram[threadIdx.x] = 0;
  if (threadIdx.x == 0) work.shared.total = 0;
  __syncthreads();
}
// A mass, or one token.
__device__ __forceinline__ void add_to_bin(const Work& work, uint32_t bin, bool by_mass,
                                           unsigned long long mass) {
  unsigned long long* sum = &work.shared.histogram[bin];
  if (by_mass) {
    if (mass) atomicAdd(sum, mass);
  } else {
    // The lower half of a count is all of it, and added by one instruction.
    atomicAdd(reinterpret_cast<uint32_t*>(sum), 1u);
  }
}

// The block: adds up all ranks' histograms. The last bin stands for the total with `window`.
template <int kWorld>
__device__ inline bool exchange_histogram(Work& work, bool window) {
  __syncthreads();
  if (window && threadIdx.x == 0) work.shared.histogram[kBins - 1] = work.shared.total;
  __syncthreads();
  if constexpr (kWorld > 1) {
    unsigned long long sum = 0;
    const unsigned long long mine = threadIdx.x < kBins ? work.shared.histogram[threadIdx.x] : 0;
    if (!exchange_packs<kWorld>(work, kBins, pack_of(mine),
                                [&](int, int, uint2 pack) { sum += word_of(pack); })) {
      return false;
    }
    if (threadIdx.x < kBins) work.shared.histogram[threadIdx.x] = sum;
    __syncthreads();
  }
  return true;
}

// The block: the bin with which the sum reaches `wanted`; false if none does. In shared.prefix the
// bin, in shared.target what of it is wanted.
__device__ inline bool find_bin(const Work& work, unsigned long long wanted, int bins) {
  if (work.warp == 0) {
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
    // Of all bins: blocks of tokens, whose sums are rounded by themselves, may add up to more.
    const unsigned long long all = __shfl_sync(kAllLanes, sum, 31);
    if (bins == kBins && wanted > all) wanted = all;
    const unsigned reached = __ballot_sync(kAllLanes, sum >= wanted);
    if (work.lane == 0) work.shared.found = reached != 0;
    if (reached != 0 && work.lane == __ffs(reached) - 1) {
      unsigned long long left = wanted - (sum - own);
      int bin = work.lane * kEach;
      for (; work.shared.histogram[bin] < left; ++bin) left -= work.shared.histogram[bin];
      work.shared.prefix = static_cast<uint32_t>(bin);
      work.shared.target = left;
    }
  }
  __syncthreads();
  return work.shared.found;
}

// Lists the blocks of tokens that can hold a logit at or above the bound: those whose largest logit
// is as near to the row's as that of enough others. By count: k blocks of this rank whose largest
// logits are that large have k tokens that are. By mass likewise, on all ranks together; then
// *total is the row's mass. False: a failure.
template <int kWorld>
__device__ inline bool list_blocks(Work& work, const BlockSum* sums, float largest, int64_t top_k,
                                   double top_p, const RowOptions& row, unsigned long long* total) {
  const uint32_t top = key_of(largest);
  const bool by_mass = top_k <= 0;
  const auto distance_of = [&](float m) { return (top - key_of(m)) >> 16; };
  bool found = false;
  if (by_mass || top_k <= work.per_row) {
    clear_histogram(work);
    unsigned long long mass = 0;
    for (int block = threadIdx.x; block < work.per_row; block += kSampleThreads) {
      const BlockSum own = load_sum(sums + block);
      if (!(own.largest >= kNoBound)) continue;
      if (by_mass) mass += mass_of(own, largest, row.exponent);
      const uint32_t bin = distance_of(own.largest);
      if (bin >= kBins - 1) continue;
      add_to_bin(work, bin, by_mass,
                 by_mass ? fixed(weight(own.largest, largest, row.exponent)) : 1);
    }
    if (by_mass) {
      add_to_total(work, mass);
      if (!exchange_histogram<kWorld>(work, true)) return false;
      *total = work.shared.histogram[kBins - 1];
    } else {
      __syncthreads();
    }
    found = find_bin(work,
                     by_mass ? wanted_mass(top_p, *total) : static_cast<unsigned long long>(top_k),
                     kBins - 1);
  }
  const uint32_t last = found ? work.shared.prefix : 0xffffffffu;
  if (threadIdx.x == 0) work.shared.listed_count = 0;
  __syncthreads();
  for (int base = 0; base < work.per_row; base += kSampleThreads) {
    const int block = base + static_cast<int>(threadIdx.x);
    const float m = block < work.per_row ? load_sum(sums + block).largest : -infinity();
    const bool wanted = m >= kNoBound && distance_of(m) <= last;
    const unsigned lanes = __ballot_sync(kAllLanes, wanted);
    int at = 0;
    if (work.lane == 0 && lanes) at = atomicAdd(&work.shared.listed_count, __popc(lanes));
    at = __shfl_sync(kAllLanes, at, 0) + __popc(lanes & ((1u << work.lane) - 1));
    if (wanted && at < kListed) work.shared.listed[at] = block;
  }
  __syncthreads();
  return true;
}

// The least logit at or above which lie top_k tokens, or top_p of the mass: looked for among
// distances from the largest logit, in the order of the numbers' bits. The first histogram has a
// bin for each of the 255 nearest distances in bfloat16, about two powers of two, where the bound
// almost always is; few logits come to it. If it is not there, all 32 bits are looked through,
// eight at a time. known: the total, of which not all may be listed; 0: what is listed is all.
template <int kWorld, class T>
__device__ inline bool find_bound(Work& work, const T* logits, float largest, int64_t top_k,
                                  double top_p, bool by_mass, unsigned long long known,
                                  RowOptions& row) {
  constexpr int kFinest = std::is_same_v<T, float> ? 0 : std::is_same_v<T, __half> ? 8 : 16;
  const uint32_t top = key_of(largest);
  bool window = true;
  int shift = 16;
  uint32_t prefix = 0;
  unsigned long long target = 0;
  for (;;) {
    clear_histogram(work);
    unsigned long long total = 0;
    for_listed(work, logits, [&](const float (&x)[kVector]) {
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
        add_to_bin(work, distance >> shift & (kBins - 1), by_mass, mass);
      }
    });
    if (window) add_to_total(work, total);
    if (!exchange_histogram<kWorld>(work, window)) return false;
    if (window) {
      const unsigned long long all = known ? known : work.shared.histogram[kBins - 1];
      target = by_mass ? wanted_mass(top_p, all) : wanted_tokens(top_k, all);
    }
    const bool found = find_bin(work, target, window ? kBins - 1 : kBins);
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
