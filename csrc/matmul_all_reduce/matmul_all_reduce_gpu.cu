#include "matmul_all_reduce/matmul_all_reduce_gpu.h"

#include "matmul/matmul_launch.cuh"
#include "matmul_all_reduce/matmul_all_reduce_gpu.cuh"

namespace commfuse::gpu {

bool matmul_all_reduce_fits(const Workspace& workspace, int64_t m, int64_t n) {
  const int64_t tiles = divide_up(n, kTileColumns);
  return m <= kMatmulGpuMaxRows && tiles <= kMaxTiles &&
         tiles * m * kTileUnits * 16 <= workspace.slot_bytes && m * tiles <= kSquares;
}

void matmul_all_reduce(const CallSite& site, const MatmulAllReduceArgs& a) {
  const auto run = [&]<class T>() {
    const int64_t tiles = divide_up(a.matmul.n, kTileColumns);
    const TileSlots slots = {site.workspace, static_cast<int>(a.matmul.m),
                             static_cast<int>(a.matmul.n), a.two_shot};
    const Announcement announcement(site.descriptor);
    MatmulLaunch<T, SendTiles<T>>(a.matmul, {slots, announcement}, site.stream).run();
    const ReduceTiles<T> reduce = {slots,
                                   announcement,
                                   static_cast<const T*>(a.bias),
                                   static_cast<const T*>(a.residual),
                                   static_cast<const T*>(a.norm_weight),
                                   a.eps,
                                   static_cast<T*>(a.out),
                                   static_cast<T*>(a.y)};
    const int64_t groups = divide_up(tiles, tiles_of_group(slots.m));
    const int blocks = static_cast<int>(std::min<int64_t>(groups, site.max_blocks));
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
