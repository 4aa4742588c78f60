#include "send/send_gpu.h"

#include "gpu/launch.cuh"
#include "send/send_gpu.cuh"

namespace commfuse::gpu {

void send(const MessageSite& site, BlockRange range, const SendArgs& a) {
  with_type(a.dtype, [&]<class T>() {
    launch(send_rows<T>, message_grid(site, range, kSendThreads), site.message, range,
           static_cast<const T*>(a.x), static_cast<const T*>(a.residual));
  });
}

void load_send() {
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() { load(send_rows<T>); });
  }
}

}  // namespace commfuse::gpu
