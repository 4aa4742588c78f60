#include "matmul/matmul_gpu.h"

#include "matmul/matmul_launch.cuh"

namespace commfuse::gpu {

MatmulPlan matmul_plan(int64_t n, int64_t k, int max_blocks) {
  if (n < 1 || k < 1 || max_blocks < 1) throw std::invalid_argument("matmul: N, K, blocks < 1");
  max_blocks = std::min(max_blocks, kMatmulGpuCounters);
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
  return kMatmulGpuCounters * sizeof(uint32_t) +
         size_t{16} * plan.rest * plan.splits * (kMatmulGpuMaxRows / 8) * kComputeThreads;
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
