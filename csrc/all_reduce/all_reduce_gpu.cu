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
      return staging_bytes(workspace.world, workspace.slot_bytes);
  }
  return 0;
}

namespace {

template <bool kStaged>
void bulk(const CallSite& site, DType dtype, const PeerTensor& x, const void* from,
          const void* residual, void* out, int64_t n) {
  const int world = site.workspace.world;
  const int64_t part = (n * static_cast<int64_t>(size_of(dtype)) + world - 1) / world;
  with_type(dtype, [&]<class T>() {
    with_world(world, [&]<int kWorld>() {
      launch(all_reduce_bulk<T, kWorld, kStaged>, bulk_grid(part, site), site.workspace,
             Announcement(site.descriptor), x, static_cast<const T*>(from),
             static_cast<const T*>(residual), static_cast<T*>(out), n, site.behind_gemm);
    });
  });
}

}  // namespace

void all_reduce(const CallSite& site, AllReduce algorithm, DType dtype, const void* x,
                const void* residual, void* out, int64_t n) {
  const Workspace& workspace = site.workspace;
  const int world = workspace.world;
  if (algorithm == AllReduce::bulk) {
    PeerTensor staging = {};
    for (int r = 0; r < world; ++r) staging.data[r] = workspace.staging(r);
    return bulk<true>(site, dtype, staging, x == staging.data[workspace.rank] ? nullptr : x,
                      residual, out, n);
  }
  const Announcement announcement(site.descriptor);
  with_type(dtype, [&]<class T>() {
    const T *from = static_cast<const T*>(x), *addend = static_cast<const T*>(residual);
    T* to = static_cast<T*>(out);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    with_world(world, [&]<int kWorld>() {
      if (algorithm == AllReduce::one_shot) {
        launch(all_reduce_one_shot<T, kWorld>, line_grid(bytes, site), workspace, announcement,
               from, addend, to, n, site.behind_gemm);
      } else {
        launch(all_reduce_two_shot<T, kWorld>, line_grid((bytes + world - 1) / world, site),
               workspace, announcement, from, addend, to, n, site.behind_gemm);
      }
    });
  });
}

void all_reduce_in_place(const CallSite& site, DType dtype, void* const* peers, int64_t n) {
  PeerTensor x = {};
  std::copy_n(peers, site.workspace.world, x.data);
  bulk<false>(site, dtype, x, nullptr, nullptr, nullptr, n);
}

void load_all_reduce() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() {
      for (int world : {2, 4, 8}) {
        with_world(world, [&]<int kWorld>() {
          load(all_reduce_one_shot<T, kWorld>);
          load(all_reduce_two_shot<T, kWorld>);
          load(all_reduce_bulk<T, kWorld, true>);
          load(all_reduce_bulk<T, kWorld, false>);
        });
      }
    });
  }
}

}  // namespace commfuse::gpu
