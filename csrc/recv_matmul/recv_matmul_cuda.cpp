// For few rows our decode GEMM, which fetches its first weights while the message is waited for;
// else a GEMM of torch's, part by part, each while the next arrives.
#include <tuple>

#include "gpu/channel_call.h"
#include "matmul/matmul_cuda.h"
#include "recv/recv_gpu.h"

namespace commfuse::gpu {
namespace {

std::tuple<at::Tensor, at::Tensor> recv_matmul_of_tensors(
    int64_t rows, int64_t handle, const at::Tensor& w, int64_t n,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& norm_weight,
    double eps) {
  const ChannelCall call(w, handle);
  check_target(call.channel, "recv_matmul");
  check_rows(call.channel, rows);
  const ChannelShape& shape = call.channel.shape();
  const at::Tensor x =
      at::empty({rows, shape.columns}, w.options().dtype(scalar_type(call.channel)));
  check_matches(w, x, {n, shape.columns}, "w");
  if (norm_weight) check_matches(*norm_weight, x, {shape.columns}, "norm_weight");
  if (bias) check_matches(*bias, x, {n}, "bias");
  // What is multiplied: x itself where nothing is normalised.
  const at::Tensor in = norm_weight ? at::empty(x.sizes(), x.options()) : x;
  const at::Tensor y = at::empty({rows, n}, x.options());
  const RecvArgs args = {shape.dtype, x.mutable_data_ptr(), data_or_null(norm_weight),
                         static_cast<float>(eps), in.mutable_data_ptr()};

  const GpuMessage message = call.enter(Op::recv, rows);
  if (matmul_serves(in) && n > 0) {
    recv(call.site(message), all_blocks(message), args);
    call.wrote({range_of(x), range_of(in)});
    matmul(matmul_args(in, w, call.end().max_blocks(), 0, call.stream), data_or_null(bias),
           y.mutable_data_ptr(), call.stream);
    call.wrote({range_of(y)});
    return {y, x};
  }
  const std::vector<BlockRange> parts = gemm_parts(message.blocks);
  const bool beside = parts.size() > 1;
  SideStream& side = call.end().side();
  if (beside) side.follow(call.stream);
  for (const BlockRange& part : parts) {
    if (beside) {
      await_rows(call.site_beside(message), part);
      recv(call.site_beside(message), part, args);
      side.join(call.stream);
    } else {
      recv(call.site(message), part, args);
    }
    multiply_rows(message, part, in, w, bias, y);
  }
  call.wrote({range_of(x), range_of(in), range_of(y)});
  return {y, x};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("recv_matmul", &recv_matmul_of_tensors); }

}  // namespace commfuse::gpu
