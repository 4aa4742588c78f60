#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"

#include <algorithm>

#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.cuh"
#include "gpu/launch.cuh"

namespace commfuse::gpu {
namespace {

int64_t packs_of(int64_t n, DType dtype) {
  return (n * static_cast<int64_t>(size_of(dtype)) + 7) / 8;
}

// A row's packs, in one stretch of a block's threads if they fit.
int threads_for(int64_t packs) {
  int threads = 128;
  while (threads < 1024 && threads < packs) threads *= 2;
  return threads;
}

template <class T, int kWorld>
auto kernel(bool two_shot) {
  return two_shot ? all_reduce_rms_norm<T, kWorld, true> : all_reduce_rms_norm<T, kWorld, false>;
}

}  // namespace

int64_t rms_norm_rows_by_lines(const Workspace& workspace, DType dtype, int64_t n, bool two_shot) {
  const int64_t packs = packs_of(n, dtype), world = workspace.world;
  const int64_t lines = two_shot ? 2 * ((packs + world - 1) / world) : packs;
  return kLineBytes / (16 * std::max<int64_t>(1, lines));
}

void all_reduce_rms_norm(const CallSite& site, const RMSNormArgs& a, bool two_shot) {
  const int64_t packs = packs_of(a.n, a.dtype);
  const int world = site.workspace.world;
  const Grid grid = {std::clamp(a.rows, 1, site.max_blocks),
                     threads_for(two_shot ? (packs + world - 1) / world : packs), site.stream};
  with_type(a.dtype, [&]<class T>() {
    with_world(world, [&]<int kWorld>() {
      launch(kernel<T, kWorld>(two_shot), grid, site.workspace, Announcement(site.descriptor),
             static_cast<const T*>(a.x), static_cast<const T*>(a.residual),
             static_cast<const T*>(a.weight), a.eps, static_cast<T*>(a.y), static_cast<T*>(a.out),
             a.rows, a.n);
    });
  });
}

void rms_norm(const RMSNormArgs& a, int max_blocks, cudaStream_t stream) {
  if (a.rows == 0 || a.n == 0) return;
  const Grid grid = {std::clamp(a.rows, 1, 4 * max_blocks), 512, stream};
  with_type(a.dtype, [&]<class T>() {
    launch(rms_norm_rows<T>, grid, static_cast<const T*>(a.out), static_cast<const T*>(a.weight),
           a.eps, static_cast<T*>(a.y), a.rows, a.n);
  });
}

void load_all_reduce_rms_norm() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() {
      load(rms_norm_rows<T>);
      for (int world : {2, 4, 8}) {
        with_world(world, [&]<int kWorld>() {
          load(all_reduce_rms_norm<T, kWorld, false>);
          load(all_reduce_rms_norm<T, kWorld, true>);
        });
      }
    });
  }
}

}  // namespace commfuse::gpu
