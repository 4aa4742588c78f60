#include "all_gather/all_gather_gpu.h"

#include "all_gather/all_gather_gpu.cuh"
#include "gpu/launch.cuh"

namespace commfuse::gpu {
namespace {

// f<T>() for a type of the elements' size.
template <class F>
void with_size(DType dtype, F f) {
  if (size_of(dtype) == 2) return f.template operator()<__half>();
  f.template operator()<float>();
}

}  // namespace

int64_t all_gather_capacity(const Workspace& workspace, bool by_lines) {
  return by_lines ? kLineBytes / 2 : workspace.slot_bytes;
}

void all_gather(const CallSite& site, bool by_lines, DType dtype, const void* x, void* out,
                int64_t stride, int64_t n) {
  with_size(dtype, [&]<class T>() {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    with_world(site.workspace.world, [&]<int kWorld>() {
      launch(by_lines ? all_gather_by_lines<T, kWorld> : all_gather_in_bulk<T, kWorld>,
             by_lines ? line_grid(bytes, site) : bulk_grid(bytes, site), site.workspace,
             Announcement(site.descriptor), static_cast<const T*>(x), static_cast<T*>(out), stride,
             n);
    });
  });
}

void load_all_gather() {
  for (DType dtype : {DType::float16, DType::float32}) {
    with_size(dtype, [&]<class T>() {
      for (int world : {2, 4, 8}) {
        with_world(world, [&]<int kWorld>() {
          load(all_gather_by_lines<T, kWorld>);
          load(all_gather_in_bulk<T, kWorld>);
        });
      }
    });
  }
}

}  // namespace commfuse::gpu
