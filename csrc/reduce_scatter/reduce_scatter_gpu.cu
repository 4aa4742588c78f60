#include "reduce_scatter/reduce_scatter_gpu.h"

#include "gpu/launch.cuh"
#include "reduce_scatter/reduce_scatter_gpu.cuh"

namespace commfuse::gpu {

int64_t reduce_scatter_capacity(const Workspace& workspace, bool by_lines) {
  return by_lines ? kLineBytes / 2 : workspace.slot_bytes;
}

void reduce_scatter(const CallSite& site, bool by_lines, DType dtype, const void* x, int64_t stride,
                    void* out, int64_t n) {
  with_type(dtype, [&]<class T>() {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    with_world(site.workspace.world, [&]<int kWorld>() {
      launch(by_lines ? reduce_scatter_by_lines<T, kWorld> : reduce_scatter_in_bulk<T, kWorld>,
             by_lines ? line_grid(bytes, site) : bulk_grid(bytes, site), site.workspace,
             Announcement(site.descriptor), static_cast<const T*>(x), stride, static_cast<T*>(out),
             n);
    });
  });
}

void load_reduce_scatter() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() {
      for (int world : {2, 4, 8}) {
        with_world(world, [&]<int kWorld>() {
          load(reduce_scatter_by_lines<T, kWorld>);
          load(reduce_scatter_in_bulk<T, kWorld>);
        });
      }
    });
  }
}

}  // namespace commfuse::gpu
