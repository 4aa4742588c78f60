#include "matmul_send/matmul_send_gpu.h"

#include "matmul/matmul_launch.cuh"
#include "matmul_send/matmul_send_gpu.cuh"

namespace commfuse::gpu {

void matmul_send(const MessageSite& site, const MatmulSendArgs& a) {
  const auto run = [&]<class T>() {
    const PutTiles<T> epilogue = {site.message, static_cast<const T*>(a.bias),
                                  static_cast<const T*>(a.residual), static_cast<int>(a.matmul.m),
                                  static_cast<int>(a.matmul.n)};
    MatmulLaunch<T, PutTiles<T>>(a.matmul, epilogue, site.stream).run();
  };
  if (a.matmul.dtype == DType::bfloat16) return run.template operator()<__nv_bfloat16>();
  run.template operator()<__half>();
}

void load_matmul_send() {
  MatmulLaunch<__nv_bfloat16, PutTiles<__nv_bfloat16>>::load_all();
  MatmulLaunch<__half, PutTiles<__half>>::load_all();
}

}  // namespace commfuse::gpu
