#include "all_reduce/all_reduce_gpu.h"

#include <algorithm>

#include "all_reduce/all_reduce_gpu.cuh"
#include "gpu/launch.cuh"

namespace commfuse::gpu {
int64_t all_reduce_capacity(const Workspace& workspace, AllReduce algorithm) {
  // A line carries half its bytes; two-shot has lines for both hops.
  switch (algorithm) {
    case AllReduce::one_shot:
      return kLineBytes / 2;
    case AllReduce::two_shot:
      return workspace.world * (kLineBytes / 4);
    case AllReduce::bulk:
      return workspace.world * workspace.slot_bytes;
  }
  return 0;
}

void all_reduce(const CallSite& site, AllReduce algorithm, DType dtype, const void* x,
                const void* residual, void* out, int64_t n) {
  const Workspace& workspace = site.workspace;
  const Announcement announcement(site.descriptor);
  const int world = workspace.world;
  with_type(dtype, [&]<class T>() {
    const T *from = static_cast<const T*>(x), *addend = static_cast<const T*>(residual);
    T* to = static_cast<T*>(out);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    with_world(world, [&]<int kWorld>() {
      switch (algorithm) {
        case AllReduce::one_shot:
          return launch(all_reduce_one_shot<T, kWorld>, line_grid(bytes, site), workspace,
                        announcement, from, addend, to, n);
        case AllReduce::two_shot:
          return launch(all_reduce_two_shot<T, kWorld>,
                        line_grid((bytes + world - 1) / world, site), workspace, announcement, from,
                        addend, to, n);
        case AllReduce::bulk:
          return launch(all_reduce_bulk<T, kWorld>, bulk_grid((bytes + world - 1) / world, site),
                        workspace, announcement, from, addend, to, n);
      }
    });
  });
}

void all_reduce_in_place(const CallSite& site, DType dtype, void* const* peers, int64_t n) {
  const Announcement announcement(site.descriptor);
  PeerTensor x = {};
  std::copy_n(peers, site.workspace.world, x.data);
  with_type(dtype, [&]<class T>() {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    with_world(site.workspace.world, [&]<int kWorld>() {
      launch(all_reduce_in_place<T, kWorld>,
             bulk_grid((bytes + site.workspace.world - 1) / site.workspace.world, site),
             site.workspace, announcement, x, n);
    });
  });
}

void load_all_reduce() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() {
      for (int world : {2, 4, 8}) {
        with_world(world, [&]<int kWorld>() {
          load(all_reduce_one_shot<T, kWorld>);
          load(all_reduce_two_shot<T, kWorld>);
          load(all_reduce_bulk<T, kWorld>);
          load(all_reduce_in_place<T, kWorld>);
        });
      }
    });
  }
}

}  // namespace commfuse::gpu
