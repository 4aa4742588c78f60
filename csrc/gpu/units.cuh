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

// Of kernels that keep many units on the way in each thread. At most half of a multiprocessor's
// registers (__launch_bounds__(kBulkThreads, 2)): a successor that starts early finds room.
constexpr int kBulkThreads = 256;

// How many units of each of kWorld sources a thread has on the way at once. The compiler moves no
// load across a store: what is to overlap must be loaded before.
template <int kWorld>
constexpr int kAtOnce = 2 + 4 / kWorld;

// A block moves unit j of every rank p but `own`, begin <= j < end in steps of its threads: what
// take(p, j) loads, put(p, j, unit) stores.
template <int kWorld, class Take, class Put>
__device__ __forceinline__ void move_units(int64_t begin, int64_t end, int world, int own,
                                           Take take, Put put) {
  for (int64_t base = begin; base < end; base += kAtOnce<kWorld> * int64_t{blockDim.x}) {
    uint4 unit[kAtOnce<kWorld>][kWorld];
#pragma unroll
    for (int b = 0; b < kAtOnce<kWorld>; ++b) {
      const int64_t j = base + b * int64_t{blockDim.x};
#pragma unroll
      for (int p = 0; p < kWorld; ++p) {
        if (j < end && p < world && p != own) unit[b][p] = take(p, j);
      }
    }
#pragma unroll
    for (int b = 0; b < kAtOnce<kWorld>; ++b) {
      const int64_t j = base + b * int64_t{blockDim.x};
#pragma unroll
      for (int p = 0; p < kWorld; ++p) {
        if (j < end && p < world && p != own) put(p, j, unit[b][p]);
      }
    }
  }
}

// The sum of one unit of all ranks in rank order, + each addend that is not null, rounded once.
template <class T, int kWorld, class... Addends>
__device__ __forceinline__ uint4 sum_units(const uint4 (&unit)[kWorld], int world,
                                           const Addends*... addends) {
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

// A block adds unit j of all ranks, likewise: what take(source, j) loads, + residual(j) where
// with_residual; put(j, total) stores it.
template <class T, int kWorld, class Take, class Residual, class Put>
__device__ __forceinline__ void add_units(int64_t begin, int64_t end, int world, Take take,
                                          bool with_residual, Residual residual, Put put) {
  for (int64_t base = begin; base < end; base += kAtOnce<kWorld> * int64_t{blockDim.x}) {
    uint4 unit[kAtOnce<kWorld>][kWorld], addend[kAtOnce<kWorld>];
#pragma unroll
    for (int b = 0; b < kAtOnce<kWorld>; ++b) {
      const int64_t j = base + b * int64_t{blockDim.x};
#pragma unroll
      for (int s = 0; s < kWorld; ++s) {
        if (j < end && s < world) unit[b][s] = take(s, j);
      }
      if (j < end && with_residual) addend[b] = residual(j);
    }
#pragma unroll
    for (int b = 0; b < kAtOnce<kWorld>; ++b) {
      const int64_t j = base + b * int64_t{blockDim.x};
      if (j < end) put(j, sum_units<T>(unit[b], world, with_residual ? &addend[b] : nullptr));
    }
  }
}

}  // namespace commfuse::gpu
