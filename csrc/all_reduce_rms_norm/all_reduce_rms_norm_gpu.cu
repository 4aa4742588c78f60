#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.h"

#include "all_reduce_rms_norm/all_reduce_rms_norm_gpu.cuh"
#include "gpu/launch.cuh"

namespace commfuse::gpu {

void rms_norm(DType dtype, const void* x, const void* weight, float eps, void* y, int64_t rows,
              int64_t n, cudaStream_t stream, bool successor_early) {
  if (rows == 0 || n == 0) return;
  const int threads = norm_threads(n * static_cast<int64_t>(size_of(dtype)));
  with_type(dtype, [&]<class T>() {
    launch(rms_norm_rows<T>, Grid{static_cast<int>(rows), threads, stream},
           static_cast<const T*>(x), static_cast<const T*>(weight), eps, static_cast<T*>(y),
           static_cast<int>(n), successor_early);
  });
}

void load_rms_norm() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() { load(rms_norm_rows<T>); });
  }
}

}  // namespace commfuse::gpu
