#include "recv/recv_gpu.h"

#include "gpu/launch.cuh"
#include "recv/recv_gpu.cuh"

namespace commfuse::gpu {

void recv(const MessageSite& site, BlockRange range, const RecvArgs& a) {
  const int64_t row_bytes = site.message.columns * static_cast<int64_t>(size_of(a.dtype));
  const int threads = a.norm_weight ? norm_threads(row_bytes) : kRecvThreads;
  with_type(a.dtype, [&]<class T>() {
    const RecvRows<T> to = {static_cast<T*>(a.x), static_cast<const T*>(a.norm_weight), a.eps,
                            static_cast<T*>(a.y)};
    launch(recv_rows<T>, message_grid(site, range, threads), site.message, range, to);
  });
}

void await_rows(const MessageSite& site, BlockRange range) {
  launch(await_words, Grid{1, kMessageBlocks, site.stream, 0, site.early}, site.message, range);
}

void load_recv() {
  load(await_words);
  for (DType dtype : {DType::bfloat16, DType::float16, DType::float32}) {
    with_type(dtype, [&]<class T>() { load(recv_rows<T>); });
  }
}

}  // namespace commfuse::gpu
