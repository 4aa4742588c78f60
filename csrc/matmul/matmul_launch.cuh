// Launches the decode GEMM with an epilogue. Included where an epilogue is instantiated.
#pragma once

#include <cudaTypedefs.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "gpu/launch.cuh"
#include "matmul/matmul_gpu.cuh"

namespace commfuse::gpu {

// From the driver, so that nothing links against libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result));
    if (!found) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return encode;
}

// A row-major [rows, k] matrix, in boxes of box_rows rows and one swizzled row of k.
inline CUtensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t k,
                              int box_rows) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(k) * 2};
  const cuuint32_t box[] = {kSubChunk, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_stride[] = {1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map,
      dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      2, const_cast<void*>(data), size, stride, box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) + " for [" +
                             std::to_string(rows) + ", " + std::to_string(k) + "]");
  }
  return map;
}

template <class T, class Epilogue>
class MatmulLaunch {
 public:
  MatmulLaunch(const MatmulGpuArgs& args, const Epilogue& epilogue, cudaStream_t stream)
      : args_(args), epilogue_(epilogue), stream_(stream) {
    shape_ = {};
    shape_.m = static_cast<int>(args.m);
    shape_.n = static_cast<int>(args.n);
    shape_.k = static_cast<int>(args.k);
    shape_.plan = args.plan;
    shape_.aligned = args.k % 8 == 0 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                     reinterpret_cast<uintptr_t>(args.w) % 16 == 0;
    shape_.weights_early = args.weights_early;
    shape_.counters = static_cast<uint32_t*>(args.workspace);
    shape_.partials = reinterpret_cast<float4*>(shape_.counters + kMatmulGpuCounters);
  }

  void run() {
    if (args_.m <= 8) return rows<8>();
    if (args_.m <= 16) return rows<16>();
    if (args_.m <= 32) return rows<32>();
    rows<64>();
  }

  static void load_all() {
    load_rows<8>();
    load_rows<16>();
    load_rows<32>();
    load_rows<64>();
  }

 private:
  static bool is_hopper() {
    static const bool hopper = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
    return hopper;
  }

  template <int kRows>
  static void load_rows() {
    if (is_hopper()) {
      load(matmul_hopper<T, kRows, Epilogue>);
    }
    load(matmul_plain<T, kRows, Epilogue>);
  }

  template <int kRows>
  void rows() {
    if (!is_hopper() || !shape_.aligned) return plain<kRows>();
    hopper<kRows>();
  }

  template <int kRows>
  void hopper() {
    const auto kernel = matmul_hopper<T, kRows, Epilogue>;
    const MatmulPlan& plan = args_.plan;
    // What the ring cannot hold at once waits for a stage to be free; more than a block ever needs
    // would only lengthen its start.
    constexpr int kMaxStages = 24;
    const int most = plan.chunks * plan.rounds +
                     plan.parts_per_block * static_cast<int>(divide_up(plan.chunks, plan.splits));
    // The exchange that follows has to fit beside (kHopperRegisterThreads): 1 KB that every block
    // takes, and what it declares.
    constexpr int kCompanionBytes = 2048;
    static const int limit =
        device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kCompanionBytes;
    shape_.stages = std::min(kMaxStages, most);
    while (hopper_shared_bytes<kRows>(shape_.stages) > limit) --shape_.stages;
    const int bytes = hopper_shared_bytes<kRows>(shape_.stages);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));

    launch(kernel, Grid{plan.blocks, kHopperThreads, stream_, bytes},
           tensor_map(args_.w, args_.dtype, args_.n, args_.k, kTileColumns),
           tensor_map(args_.x, args_.dtype, args_.m, args_.k, kRows), shape_, epilogue_);
  }

  template <int kRows>
  void plain() {
    const auto kernel = matmul_plain<T, kRows, Epilogue>;
    constexpr int kBytes = plain_shared_bytes<kRows>();
    shape_.stages = kPlainStages;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    launch(kernel, Grid{args_.plan.blocks, kComputeThreads, stream_, kBytes},
           static_cast<const T*>(args_.w), static_cast<const T*>(args_.x), shape_, epilogue_);
  }

  MatmulGpuArgs args_;
  Epilogue epilogue_;
  cudaStream_t stream_;
  MatmulShape shape_;
};

}  // namespace commfuse::gpu
