#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"

#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.cuh"
#include "gpu/launch.cuh"

namespace commfuse::gpu {

void rms_norm(const RMSNormArgs& a, cudaStream_t stream, bool successor_early) {
  if (a.rows == 0 || a.n == 0) return;
  const int threads = norm_threads(a.n * static_cast<int64_t>(size_of(a.dtype)));
  with_type(a.dtype, [&]<class T>() {
    const NormRows<T> rows = {static_cast<const T*>(a.x),
                              static_cast<const T*>(a.residual),
                              static_cast<const T*>(a.weight),
                              static_cast<T*>(a.y),
                              static_cast<T*>(a.out),
                              a.eps,
                              static_cast<int>(a.n)};
    launch(rms_norm_rows<T>, Grid{static_cast<int>(a.rows), threads, stream}, rows,
           successor_early);
  });
}

void load_rms_norm() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() { load(rms_norm_rows<T>); });
  }
}

}  // namespace commfuse::gpu
