// The first GEMM of a pipeline stage, on rows that the stage before sends: (RMSNorm of) x w^T
// (+ bias). It begins on the rows that have arrived.
#include "recv_matmul/recv_matmul.h"

#include <cstring>
#include <optional>

#include "matmul/gemm.h"
#include "runtime/channel_tensors.h"

namespace commfuse {

std::tuple<at::Tensor, at::Tensor> recv_matmul(int64_t rows, int64_t handle,
                                               const at::Tensor& weights, int64_t n,
                                               const std::optional<at::Tensor>& bias,
                                               const std::optional<at::Tensor>& norm_weight,
                                               double eps) {
  Channel& channel = Channel::from_handle(handle);
  check_target(channel, "recv_matmul");
  check_rows(channel, rows);
  const int64_t columns = channel.shape().columns, row_bytes = channel.shape().row_bytes();
  at::Tensor x = empty_output({rows, columns}, scalar_type(channel));
  // What is multiplied: x itself where nothing is normalised.
  at::Tensor in = norm_weight ? empty_output(x.sizes(), x.scalar_type()) : x;
  at::Tensor y = empty_output({rows, n}, x.scalar_type());
  if (norm_weight) check_matches(*norm_weight, x, {columns}, "norm_weight");
  if (bias) check_matches(*bias, x, {n}, "bias");
  GemmArgs args = gemm_args(in, weights, n);
  args.bias = data_or_null(bias);
  args.out_stride = args.out_columns = n;

  std::optional<Message> message(std::in_place, channel, Op::recv, rows);
  const RowBlocks blocks = message->blocks();
  std::byte* const x_data = static_cast<std::byte*>(x.mutable_data_ptr());
  std::byte* const in_data = static_cast<std::byte*>(in.mutable_data_ptr());
  for (int begin = 0; begin < blocks.count;) {
    const int end = blocks.group_end(begin);
    const int64_t first = blocks.begin(begin);
    {
      const CommunicationTimer timer(channel.communicator());
      for (; begin < end; ++begin) {
        message->wait(begin);
        std::memcpy(x_data + blocks.begin(begin) * row_bytes, message->block(begin),
                    message->block_bytes(begin));
        for (int64_t row = blocks.begin(begin); norm_weight && row < blocks.end(begin); ++row) {
          kernels().rms_norm(args.dtype, x_data + row * row_bytes, norm_weight->const_data_ptr(),
                             static_cast<float>(eps), columns, in_data + row * row_bytes);
        }
      }
    }
    if (begin == blocks.count) message.reset();  // its slot is free while the rest is multiplied
    GemmArgs part = args;
    part.x = in_data + first * row_bytes;
    part.rows = blocks.begin(end) - first;
    part.out = static_cast<std::byte*>(y.mutable_data_ptr()) +
               first * n * static_cast<int64_t>(size_of(args.dtype));
    run_gemm(part, 0, panel_count(n));
  }
  return {y, x};
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("recv_matmul", &recv_matmul); }

}  // namespace commfuse
