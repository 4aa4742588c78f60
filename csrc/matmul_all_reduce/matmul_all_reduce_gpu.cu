#include "matmul_all_reduce/matmul_all_reduce_gpu.h"

#include "matmul/matmul_launch.cuh"
#include "matmul_all_reduce/matmul_all_reduce_gpu.cuh"

namespace commfuse::gpu {

bool matmul_all_reduce_fits(const Workspace& workspace, int64_t m, int64_t n, bool two_shot) {
  const int64_t tiles = divide_up(n, kTileColumns);
  const int64_t sent = two_shot ? 2 * divide_up(tiles, workspace.world) : tiles;
  return m <= kMatmulGpuMaxRows && m * sent * kTilePacks * kLineStride <= kLineBytes &&
         m * tiles <= kSquares;
}

void matmul_all_reduce(const CallSite& site, const MatmulAllReduceArgs& a) {
  const auto run = [&]<class T>() {
    const ReduceTiles<T> epilogue = {site.workspace,
                                     Announcement(site.descriptor),
                                     static_cast<const T*>(a.bias),
                                     static_cast<const T*>(a.residual),
                                     static_cast<const T*>(a.norm_weight),
                                     a.eps,
                                     static_cast<T*>(a.out),
                                     static_cast<T*>(a.y),
                                     static_cast<int>(a.matmul.m),
                                     static_cast<int>(a.matmul.n),
                                     a.two_shot};
    MatmulLaunch<T, ReduceTiles<T>>(a.matmul, epilogue, site.stream).run();
  };
  if (a.matmul.dtype == DType::bfloat16) return run.template operator()<__nv_bfloat16>();
  run.template operator()<__half>();
}

void load_matmul_all_reduce() {
  MatmulLaunch<__nv_bfloat16, ReduceTiles<__nv_bfloat16>>::load_all();
  MatmulLaunch<__half, ReduceTiles<__half>>::load_all();
}

}  // namespace commfuse::gpu
