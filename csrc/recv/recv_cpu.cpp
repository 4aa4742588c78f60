#include <cstring>
#include <tuple>

#include "runtime/channel_tensors.h"

namespace commfuse {
namespace {

// arrived(x, begin, end): called for rows [begin, end), which begin at x, as soon as they are
// copied.
template <class Arrived>
at::Tensor receive(Channel& channel, int64_t rows, Arrived arrived) {
  check_target(channel, "recv");
  check_rows(channel, rows);
  at::Tensor out = empty_output({rows, channel.shape().columns}, scalar_type(channel));
  std::byte* to = static_cast<std::byte*>(out.mutable_data_ptr());
  const CommunicationTimer timer(channel.communicator());
  Message message(channel, Op::recv, rows);
  for (int b = 0; b < message.blocks().count; ++b) {
    message.wait(b);
    const size_t bytes = message.block_bytes(b);
    std::memcpy(to, message.block(b), bytes);
    arrived(to, message.blocks().begin(b), message.blocks().end(b));
    to += bytes;
  }
  return out;
}

at::Tensor recv(int64_t rows, int64_t handle, const at::Tensor&) {
  return receive(Channel::from_handle(handle), rows, [](const std::byte*, int64_t, int64_t) {});
}

std::tuple<at::Tensor, at::Tensor> recv_rms_norm(int64_t rows, int64_t handle,
                                                 const at::Tensor& norm_weight, double eps) {
  Channel& channel = Channel::from_handle(handle);
  const int64_t columns = channel.shape().columns, row_bytes = channel.shape().row_bytes();
  check_rows(channel, rows);
  at::Tensor y = empty_output({rows, columns}, scalar_type(channel));
  check_matches(norm_weight, y, {columns}, "norm_weight");
  std::byte* to = static_cast<std::byte*>(y.mutable_data_ptr());
  at::Tensor out = receive(channel, rows, [&](const std::byte* x, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row, x += row_bytes) {
      kernels().rms_norm(channel.shape().dtype, x, norm_weight.const_data_ptr(),
                         static_cast<float>(eps), columns, to + row * row_bytes);
    }
  });
  return {y, out};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) {
  m.impl("recv", &recv);
  m.impl("recv.rms_norm", &recv_rms_norm);
}

}  // namespace commfuse
