#include <cudaTypedefs.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "matmul/matmul_gpu.cuh"

namespace commfuse {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
  }
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// From the driver, so that nothing links against libcuda.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
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
CUtensorMap tensor_map(const void* data, DType dtype, int64_t rows, int64_t k, int box_rows) {
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
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  }
  return map;
}

MatmulShape shape_of(const MatmulGpuArgs& args, const MatmulPlan& plan, int stages) {
  MatmulShape shape = {};
  shape.m = static_cast<int>(args.m);
  shape.n = static_cast<int>(args.n);
  shape.k = static_cast<int>(args.k);
  shape.plan = plan;
  shape.stages = stages;
  shape.counters = static_cast<uint32_t*>(args.workspace);
  shape.partials = reinterpret_cast<float4*>(static_cast<uint8_t*>(args.workspace) +
                                             divide_up(plan.rest * sizeof(uint32_t), 16) * 16);
  return shape;
}

template <class T, int kRows, int kCluster>
void launch_hopper(const MatmulGpuArgs& args, const MatmulPlan& plan, int max_stages,
                   cudaStream_t stream) {
  const auto kernel = matmul_hopper<T, kRows, kCluster, StoreTile<T>>;
  // What the ring cannot hold at once waits for a stage to be free; more than a block ever needs
  // would only lengthen its start.
  const int most = plan.chunks * plan.rounds +
                   plan.parts_per_block * static_cast<int>(divide_up(plan.chunks, plan.splits));
  int stages = std::min(max_stages, most);
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  while (hopper_shared_bytes<kRows>(stages) > limit) --stages;
  const int bytes = hopper_shared_bytes<kRows>(stages);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));

  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (kCluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {kCluster, 1, 1};
  }
  if (args.weights_early) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  const StoreTile<T> epilogue = {static_cast<T*>(args.y), static_cast<int>(args.m),
                                 static_cast<int>(args.n)};
  check(cudaLaunchKernelEx(&config, kernel,
                           tensor_map(args.w, args.dtype, args.n, args.k, kTileColumns),
                           tensor_map(args.x, args.dtype, args.m, args.k, kRows / kCluster),
                           shape_of(args, plan, stages), epilogue));
}

template <class T, int kRows>
void launch_plain(const MatmulGpuArgs& args, const MatmulPlan& plan, cudaStream_t stream) {
  const auto kernel = matmul_plain<T, kRows, StoreTile<T>>;
  constexpr int kBytes = plain_shared_bytes<kRows>();
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const StoreTile<T> epilogue = {static_cast<T*>(args.y), static_cast<int>(args.m),
                                 static_cast<int>(args.n)};
  kernel<<<plan.blocks, kComputeThreads, kBytes, stream>>>(
      static_cast<const T*>(args.w), static_cast<const T*>(args.x),
      shape_of(args, plan, kPlainStages), epilogue);
  check(cudaGetLastError());
}

template <class T, int kRows>
void launch(const MatmulGpuArgs& args, const MatmulPlan& plan, cudaStream_t stream) {
  const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor) == 9;
  if (!hopper || args.k % 8 != 0) return launch_plain<T, kRows>(args, plan, stream);
  // From 32 rows on x is as much traffic to the multiprocessors as half the weights: pairs of
  // blocks share what they fetch of it.
  constexpr int kMaxStages = 24;
  if constexpr (kRows >= 32) {
    if (plan.rest % 2 == 0 && plan.blocks % 2 == 0) {
      return launch_hopper<T, kRows, 2>(args, plan, kMaxStages, stream);
    }
  }
  launch_hopper<T, kRows, 1>(args, plan, kMaxStages, stream);
}

template <class T>
void launch_rows(const MatmulGpuArgs& args, const MatmulPlan& plan, cudaStream_t stream) {
  if (args.m <= 8) return launch<T, 8>(args, plan, stream);
  if (args.m <= 16) return launch<T, 16>(args, plan, stream);
  if (args.m <= 32) return launch<T, 32>(args, plan, stream);
  launch<T, 64>(args, plan, stream);
}

}  // namespace

MatmulPlan matmul_plan(int64_t n, int64_t k, int max_blocks) {
  if (n < 1 || k < 1 || max_blocks < 1) throw std::invalid_argument("matmul: N, K, blocks < 1");
  MatmulPlan plan = {};
  plan.tiles = static_cast<int>(divide_up(n, kTileColumns));
  plan.chunks = static_cast<int>(divide_up(k, kChunk));
  plan.rounds = plan.tiles / max_blocks;
  plan.rest = plan.tiles % max_blocks;
  plan.splits = 1;
  plan.blocks = plan.rounds > 0 ? max_blocks : plan.rest;
  if (plan.rest == 0) return plan;

  // In units of the time that a block takes for a tile when all blocks stream. Fewer blocks stream
  // faster, each up to kAlone of its share; putting parts together costs time that only k pays for.
  constexpr double kAlone = 1.6, kCombine = 390.0;
  double best = 0;
  for (int splits = 1; splits <= std::min(kMaxSplits, plan.chunks); ++splits) {
    const int per_block = static_cast<int>(divide_up(plan.rest * splits, max_blocks));
    const double time =
        std::max(static_cast<double>(plan.rest) / max_blocks, per_block / (kAlone * splits)) +
        (splits > 1 ? per_block * kCombine / static_cast<double>(k) : 0);
    if (splits > 1 && time >= best) continue;
    best = time;
    plan.splits = splits;
    plan.parts_per_block = per_block;
  }
  if (plan.rounds == 0) {
    plan.blocks = static_cast<int>(divide_up(plan.rest * plan.splits, plan.parts_per_block));
  }
  return plan;
}

size_t matmul_gpu_workspace_bytes(const MatmulPlan& plan) {
  if (plan.splits == 1) return 0;
  return divide_up(plan.rest * sizeof(uint32_t), 16) * 16 +
         size_t{16} * plan.rest * plan.splits * (kMatmulGpuMaxRows / 8) * kComputeThreads;
}

void matmul_gpu(const MatmulGpuArgs& args, cudaStream_t stream) {
  if (args.m == 0) return;
  if (args.m < 0 || args.m > kMatmulGpuMaxRows) {
    throw std::invalid_argument("matmul: 0 to 64 rows, not " + std::to_string(args.m));
  }
  if (args.n > INT32_MAX || args.k > INT32_MAX)
    throw std::invalid_argument("matmul: N, K too large");
  const int blocks =
      args.max_blocks > 0 ? args.max_blocks : attribute(cudaDevAttrMultiProcessorCount);
  const MatmulPlan plan = matmul_plan(args.n, args.k, blocks);
  if (plan.splits > 1 && !args.workspace) throw std::invalid_argument("matmul: no workspace");
  switch (args.dtype) {
    case DType::bfloat16:
      return launch_rows<__nv_bfloat16>(args, plan, stream);
    case DType::float16:
      return launch_rows<__half>(args, plan, stream);
    default:
      throw std::invalid_argument("matmul: bfloat16 or float16");
  }
}

}  // namespace commfuse
