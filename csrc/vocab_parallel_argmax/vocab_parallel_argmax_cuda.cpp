#include "vocab_parallel_sample/sample_cuda.h"

namespace commfuse::gpu {
namespace {

at::Tensor vocab_parallel_argmax(const at::Tensor& logits, int64_t vocab_begin, int64_t handle) {
  GpuCall call(logits, handle);
  Draws draws = {};  // without sampling: at temperature 0
  const int64_t rows = logits.dim() ? logits.size(0) : 0;
  set_logits(draws, logits, vocab_begin, rows);
  const at::Tensor out = at::empty({rows}, logits.options().dtype(at::kLong));
  draws.tokens = out.mutable_data_ptr<int64_t>();
  draw_all(call, describe(Op::vocab_parallel_argmax, dtype_of_tensor(logits, "logits"), {rows}),
           logits, draws);
  call.wrote({range_of(out)});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("vocab_parallel_argmax", &vocab_parallel_argmax); }

}  // namespace commfuse::gpu
