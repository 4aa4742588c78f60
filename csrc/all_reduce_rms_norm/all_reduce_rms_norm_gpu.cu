#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"

#include <algorithm>

#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.cuh"
#include "gpu/launch.cuh"

namespace commfuse::gpu {
namespace {

// Units of 16 bytes, of which a row is a whole number.
int64_t units_of(int64_t n, DType dtype) {
  return (n * static_cast<int64_t>(size_of(dtype)) + 15) / 16;
}

template <class T, int kWorld>
auto kernel(AllReduceRMSNorm algorithm) {
  return algorithm == AllReduceRMSNorm::by_lines ? all_reduce_rms_norm_by_lines<T, kWorld>
                                                 : all_reduce_rms_norm_by_rows<T, kWorld>;
}

}  // namespace

int64_t all_reduce_rms_norm_capacity(const Workspace& workspace, AllReduceRMSNorm algorithm,
                                     DType dtype, int64_t n) {
  const int64_t units = std::max<int64_t>(1, units_of(n, dtype));
  // A unit is two lines.
  if (algorithm == AllReduceRMSNorm::by_lines) return kLineBytes / (2 * 16 * units);
  return workspace.slot_bytes / (16 * units) * workspace.world;
}

namespace {

int threads_for(int64_t items, int most) {
  int threads = 64;
  while (threads < most && threads < items) threads *= 2;
  return threads;
}

// A pack for each thread of a cluster, and as many clusters as surely run at the same time: two
// blocks on each multiprocessor. The blocks of a cluster must find room in one group of
// multiprocessors, of which a rank that shares its GPU has few.
Grid grid_by_lines(const CallSite& site, int64_t packs, int rows) {
  const int room = is_hopper_or_later() ? std::min(kMostBlocksOfCluster, site.max_blocks / 4) : 1;
  int cluster = 1;
  while (cluster * 2 <= room && cluster * kLineThreads < packs) cluster *= 2;
  const int clusters = std::clamp(rows, 1, std::max(1, 2 * site.max_blocks / cluster));
  const int threads = threads_for((packs + cluster - 1) / cluster, kLineThreads);
  return {clusters * cluster, threads, site.stream, 0, cluster};
}

}  // namespace

void all_reduce_rms_norm(const CallSite& site, AllReduceRMSNorm algorithm, const RMSNormArgs& a) {
  const int world = site.workspace.world;
  const int64_t units = units_of(a.n, a.dtype);
  const bool by_lines = algorithm == AllReduceRMSNorm::by_lines;
  const int groups = (a.rows + world - 1) / world;
  const Grid grid = by_lines ? grid_by_lines(site, 2 * units, a.rows)
                             : Grid{std::clamp(groups, 1, site.max_blocks),
                                    threads_for(units, kRowThreads), site.stream};
  const Workspace workspace =
      site.workspace.with_areas_of((by_lines ? 2 * a.rows : groups) * units * 16);
  with_type(a.dtype, [&]<class T>() {
    with_world(world, [&]<int kWorld>() {
      launch(kernel<T, kWorld>(algorithm), grid, workspace, Announcement(site.descriptor),
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
          load(all_reduce_rms_norm_by_lines<T, kWorld>);
          load(all_reduce_rms_norm_by_rows<T, kWorld>);
        });
      }
    });
  }
}

}  // namespace commfuse::gpu
