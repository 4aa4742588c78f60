#include <tuple>

#include "gpu/channel_call.h"
#include "recv/recv_gpu.h"

namespace commfuse::gpu {
namespace {

// {y, x}; y is undefined without norm_weight.
std::tuple<at::Tensor, at::Tensor> receive(const ChannelCall& call, int64_t rows,
                                           const at::Tensor& like, const at::Tensor* norm_weight,
                                           double eps) {
  check_target(call.channel, "recv");
  check_rows(call.channel, rows);
  const ChannelShape& shape = call.channel.shape();
  const auto options = like.options().dtype(scalar_type(call.channel));
  at::Tensor x = at::empty({rows, shape.columns}, options), y;
  RecvArgs args = {shape.dtype, x.mutable_data_ptr(), nullptr, static_cast<float>(eps), nullptr};
  if (norm_weight) {
    check_matches(*norm_weight, x, {shape.columns}, "norm_weight");
    y = at::empty(x.sizes(), options);
    args.norm_weight = norm_weight->const_data_ptr();
    args.y = y.mutable_data_ptr();
  }
  const GpuMessage message = call.enter(Op::recv, rows);
  recv(call.site(message), all_blocks(message), args);
  if (norm_weight) {
    call.wrote({range_of(x), range_of(y)});
  } else {
    call.wrote({range_of(x)});
  }
  return {y, x};
}

at::Tensor recv_of_tensor(int64_t rows, int64_t handle, const at::Tensor& like) {
  const ChannelCall call(like, handle);
  return std::get<1>(receive(call, rows, like, nullptr, 0));
}

std::tuple<at::Tensor, at::Tensor> recv_rms_norm_of_tensors(int64_t rows, int64_t handle,
                                                            const at::Tensor& norm_weight,
                                                            double eps) {
  const ChannelCall call(norm_weight, handle);
  return receive(call, rows, norm_weight, &norm_weight, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) {
  m.impl("recv", &recv_of_tensor);
  m.impl("recv.rms_norm", &recv_rms_norm_of_tensors);
}

}  // namespace commfuse::gpu
