// Units of 16 bytes: what bulk transfers move and add.
#pragma once

#include "gpu/numbers.cuh"

namespace commfuse::gpu {

// n elements in units; the last may be partial, and what is not aligned goes element by element.
template <class T>
struct Units {
  T* data;
  int64_t n;
  bool aligned;

  __device__ Units(T* data, int64_t n)
      : data(data), n(n), aligned(reinterpret_cast<uintptr_t>(data) % 16 == 0) {}

  __device__ __forceinline__ uint4 load(int64_t unit) const {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T));
    if (aligned && (unit + 1) * kElements <= n) return reinterpret_cast<const uint4*>(data)[unit];
    const Row<T> row(data, n);
    const uint2 low = row.load(2 * unit), high = row.load(2 * unit + 1);
    return {low.x, low.y, high.x, high.y};
  }
  // As of Row: what another GPU has stored in the meantime.
  __device__ __forceinline__ uint4 load_uncached(int64_t unit) const {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T));
    if (aligned && (unit + 1) * kElements <= n)
      return __ldcg(reinterpret_cast<const uint4*>(data) + unit);
    const Row<T> row(data, n);
    const uint2 low = row.load_uncached(2 * unit), high = row.load_uncached(2 * unit + 1);
    return {low.x, low.y, high.x, high.y};
  }
  __device__ __forceinline__ void store(int64_t unit, uint4 value) const {
    constexpr int kElements = 16 / static_cast<int>(sizeof(T));
    if (aligned && (unit + 1) * kElements <= n) {
      reinterpret_cast<uint4*>(data)[unit] = value;
      return;
    }
    const Row<T> row(data, n);
    row.store(2 * unit, {value.x, value.y});
    row.store(2 * unit + 1, {value.z, value.w});
  }
};

// Deals out load(i) -> store(i), i < count, to the threads of the block: four of each are on their
// way at once, which a loop of loads and stores that may alias does not bring about.
template <class Index, class Load, class Store>
__device__ __forceinline__ void move_units(Index count, Load load, Store store) {
  constexpr int kBatch = 4;
  const int step = static_cast<int>(blockDim.x);
  for (Index first = threadIdx.x; first < count; first += kBatch * step) {
    uint4 unit[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * step < count) unit[k] = load(first + k * step);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * step < count) store(first + k * step, unit[k]);
    }
  }
}

// The sum of one unit of all ranks in rank order, + each addend that is not null, rounded once.
template <class T, int kWorld>
struct UnitSum {
  uint4 unit[kWorld];

  template <class Address>
  __device__ __forceinline__ void load(int world, Address address) {
#pragma unroll
    for (int s = 0; s < kWorld; ++s) {
      if (s < world) unit[s] = __ldcg(address(s));
    }
  }
  template <class... Addends>
  __device__ __forceinline__ uint4 total(int world, const Addends*... addends) const {
    Floats<T> low({unit[0].x, unit[0].y}), high({unit[0].z, unit[0].w});
    const auto add = [&](const uint4& more) {
      low.add({more.x, more.y});
      high.add({more.z, more.w});
    };
#pragma unroll
    for (int s = 1; s < kWorld; ++s) {
      if (s < world) add(unit[s]);
    }
    ((addends ? add(*addends) : void()), ...);
    const uint2 a = low.pack(), b = high.pack();
    return {a.x, a.y, b.x, b.y};
  }
};

// a + b, rounded.
template <class T>
__device__ __forceinline__ uint4 sum_of(uint4 a, uint4 b) {
  Floats<T> low({a.x, a.y}), high({a.z, a.w});
  low.add({b.x, b.y});
  high.add({b.z, b.w});
  const uint2 x = low.pack(), y = high.pack();
  return {x.x, x.y, y.x, y.y};
}

// unit * scale * by, element by element.
template <class T>
__device__ __forceinline__ uint4 scaled(uint4 unit, float scale, uint4 by) {
  Floats<T> low({unit.x, unit.y}), high({unit.z, unit.w});
  low.scale(scale, {by.x, by.y});
  high.scale(scale, {by.z, by.w});
  const uint2 a = low.pack(), b = high.pack();
  return {a.x, a.y, b.x, b.y};
}

template <class T>
__device__ __forceinline__ float squares_of(uint4 unit) {
  return Floats<T>({unit.x, unit.y}).squares() + Floats<T>({unit.z, unit.w}).squares();
}

}  // namespace commfuse::gpu
