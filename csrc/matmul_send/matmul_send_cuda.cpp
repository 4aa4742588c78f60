// The fused kernel for few rows; else a GEMM of torch's, part by part, each of which travels while
// the next is computed.
#include "gpu/channel_call.h"
#include "matmul/matmul_cuda.h"
#include "matmul_send/matmul_send_gpu.h"
#include "send/send_gpu.h"

namespace commfuse::gpu {
namespace {

void matmul_send_of_tensors(const at::Tensor& x, const at::Tensor& w, int64_t n, int64_t handle,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual) {
  const ChannelCall call(x, handle);
  check_source(call.channel, "matmul_send");
  const DType dtype = dtype_of_tensor(x, "x");
  check_matrix(x, "x");
  check_matches(w, x, {n, x.size(1)}, "w");
  const int64_t m = x.size(0);
  check_rows(call.channel, m);
  check_message_type(call.channel, n, x.scalar_type(), "the product");
  if (bias) check_matches(*bias, x, {n}, "bias");
  if (residual) check_matches(*residual, x, {m, n}, "residual");

  const GpuMessage message = call.enter(Op::send, m);
  if (matmul_serves(x)) {
    const int max_blocks = call.end().max_blocks();
    matmul_send(call.site(message), {matmul_args(x, w, max_blocks, 0, call.stream),
                                     data_or_null(bias), data_or_null(residual)});
    call.wrote({});
    return;
  }
  const at::Tensor product = at::empty({m, n}, x.options());
  const std::vector<BlockRange> parts = gemm_parts(message.blocks);
  const bool beside = parts.size() > 1;
  const SendArgs args = {dtype, product.const_data_ptr(), data_or_null(residual)};
  for (const BlockRange& part : parts) {
    multiply_rows(message, part, x, w, bias, product);
    if (beside) call.end().side().follow(call.stream);
    send(beside ? call.site_beside(message) : call.site(message), part, args);
  }
  if (beside) call.end().side().join(call.stream);
  call.wrote({});
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("matmul_send", &matmul_send_of_tensors); }

}  // namespace commfuse::gpu
