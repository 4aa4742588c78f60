#include "matmul/matmul_gpu.h"

#include "matmul/matmul_launch.cuh"

namespace commfuse::gpu {

size_t matmul_gpu_workspace_bytes(const MatmulPlan& plan) {
  if (plan.splits == 1 && !plan.claimed) return 0;
  const size_t summands = plan.splits > 1 ? parts_of_rest(plan) : 0;
  return kMatmulGpuCounters * sizeof(uint32_t) +
         size_t{16} * summands * (kMatmulGpuMaxRows / 8) * kComputeThreads;
}

void matmul(const MatmulGpuArgs& args, const void* bias, void* y, cudaStream_t stream) {
  const auto run = [&]<class T>() {
    const StoreTiles<T> epilogue = {static_cast<T*>(y), static_cast<const T*>(bias),
                                    static_cast<int>(args.m), static_cast<int>(args.n)};
    MatmulLaunch<T, StoreTiles<T>>(args, epilogue, stream).run();
  };
  if (args.dtype == DType::bfloat16) return run.template operator()<__nv_bfloat16>();
  run.template operator()<__half>();
}

void load_matmul() {
  MatmulLaunch<__nv_bfloat16, StoreTiles<__nv_bfloat16>>::load_all();
  MatmulLaunch<__half, StoreTiles<__half>>::load_all();
}

}  // namespace commfuse::gpu
