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
    const TileLines lines = {site.workspace, static_cast<int>(a.matmul.m),
                             static_cast<int>(a.matmul.n), a.two_shot};
    const Announcement announcement(site.descriptor);
    MatmulLaunch<T, SendTiles<T>>(a.matmul, {lines, announcement}, site.stream).run();
    const ReduceTiles<T> reduce = {lines,
                                   announcement,
                                   static_cast<const T*>(a.bias),
                                   static_cast<const T*>(a.residual),
                                   static_cast<const T*>(a.norm_weight),
                                   a.eps,
                                   static_cast<T*>(a.out),
                                   static_cast<T*>(a.y)};
    const int64_t packs = a.matmul.m * divide_up(a.matmul.n, kTileColumns) * kTilePacks;
    const int blocks =
        static_cast<int>(std::min<int64_t>(divide_up(packs, kReduceThreads), site.max_blocks));
    with_world(site.workspace.world, [&]<int kWorld>() {
      launch(reduce_tiles<T, kWorld>, Grid{blocks, kReduceThreads, site.stream}, reduce);
    });
  };
  if (a.matmul.dtype == DType::bfloat16) return run.template operator()<__nv_bfloat16>();
  run.template operator()<__half>();
}

void load_matmul_all_reduce() {
  const auto load_type = []<class T>() {
    MatmulLaunch<T, SendTiles<T>>::load_all();
    for (int world : {2, 4, 8}) {
      with_world(world, []<int kWorld>() { load(reduce_tiles<T, kWorld>); });
    }
  };
  load_type.template operator()<__nv_bfloat16>();
  load_type.template operator()<__half>();
}

}  // namespace commfuse::gpu
