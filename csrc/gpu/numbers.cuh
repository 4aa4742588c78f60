// Packs: 8 bytes of bfloat16, float16 or float32, and sums over them in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace commfuse::gpu {

template <class T>
constexpr int kPackElements = 8 / static_cast<int>(sizeof(T));

// Two floats, rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

// The elements of a pack as floats.
template <class T>
struct Floats {
  float value[kPackElements<T>];

  __device__ __forceinline__ explicit Floats(uint2 pack) {
    if constexpr (std::is_same_v<T, float>) {
      value[0] = __uint_as_float(pack.x);
      value[1] = __uint_as_float(pack.y);
    } else {
      const float2 low = unpack_pair<T>(pack.x), high = unpack_pair<T>(pack.y);
      value[0] = low.x;
      value[1] = low.y;
      value[2] = high.x;
      value[3] = high.y;
    }
  }
  __device__ __forceinline__ void add(uint2 pack) {
    const Floats other(pack);
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) value[i] += other.value[i];
  }
  __device__ __forceinline__ void scale(float factor, uint2 weight) {
    const Floats other(weight);
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) value[i] = value[i] * factor * other.value[i];
  }
  __device__ __forceinline__ float squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPackElements<T>; ++i) sum += value[i] * value[i];
    return sum;
  }
  __device__ __forceinline__ uint2 pack() const {
    if constexpr (std::is_same_v<T, float>) {
      return {__float_as_uint(value[0]), __float_as_uint(value[1])};
    } else {
      return {pack_pair<T>(value[0], value[1]), pack_pair<T>(value[2], value[3])};
    }
  }
};

// A row of n elements, read and written in packs; the last may be partial, and a row that is not
// aligned to packs goes element by element.
template <class T>
struct Row {
  T* data;
  int64_t n;
  bool aligned;

  __device__ __forceinline__ Row(T* data, int64_t n)
      : data(data), n(n), aligned(reinterpret_cast<uintptr_t>(data) % 8 == 0) {}

  // Zeros beyond the end.
  __device__ __forceinline__ uint2 load(int64_t pack) const {
    constexpr int kElements = kPackElements<T>;
    const int64_t first = pack * kElements;
    if (aligned && first + kElements <= n) return reinterpret_cast<const uint2*>(data)[pack];
    uint2 value = {0, 0};
    auto* elements = reinterpret_cast<std::remove_const_t<T>*>(&value);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (first + i < n) elements[i] = data[first + i];
    }
    return value;
  }
  // What another block has stored in the meantime: from the L2 cache.
  __device__ __forceinline__ uint2 load_uncached(int64_t pack) const {
    constexpr int kElements = kPackElements<T>;
    const int64_t first = pack * kElements;
    if (aligned && first + kElements <= n)
      return __ldcg(reinterpret_cast<const uint2*>(data) + pack);
    using Bits = std::conditional_t<sizeof(T) == 2, unsigned short, unsigned int>;
    uint2 value = {0, 0};
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (first + i < n) {
        reinterpret_cast<Bits*>(&value)[i] =
            __ldcg(reinterpret_cast<const Bits*>(data) + first + i);
      }
    }
    return value;
  }
  __device__ __forceinline__ void store(int64_t pack, uint2 value) const {
    constexpr int kElements = kPackElements<T>;
    const int64_t first = pack * kElements;
    if (aligned && first + kElements <= n) {
      reinterpret_cast<uint2*>(data)[pack] = value;
      return;
    }
    const T* elements = reinterpret_cast<const T*>(&value);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (first + i < n) data[first + i] = elements[i];
    }
  }
};

}  // namespace commfuse::gpu
