// Single instructions that CUDA C++ has no name for.
#pragma once

namespace commfuse::gpu {

// 2^x to about 2 ulp; 0 below the normal numbers.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger; NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace commfuse::gpu
