// The last GEMM of a pipeline stage: x w^T (+ bias) (+ residual), computed straight into the next
// stage's slot and published block by block, so that it is multiplied there while later rows are
// computed here.
#include "matmul_send/matmul_send.h"

#include "matmul/gemm.h"
#include "runtime/channel_tensors.h"

namespace commfuse {

void matmul_send(const at::Tensor& x, const at::Tensor& weights, int64_t n, int64_t handle,
                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual) {
  Channel& channel = Channel::from_handle(handle);
  check_source(channel, "matmul_send");
  GemmArgs args = gemm_args(x, weights, n);
  check_rows(channel, args.rows);
  check_message_type(channel, n, x.scalar_type(), "the product");
  if (bias) check_matches(*bias, x, {n}, "bias");
  if (residual) check_matches(*residual, x, {args.rows, n}, "residual");
  const std::byte* residual_data = static_cast<const std::byte*>(data_or_null(residual));
  const int64_t size = static_cast<int64_t>(size_of(args.dtype)), row_bytes = n * size;
  args.out_stride = args.out_columns = n;

  std::optional<Message> message;
  {
    const CommunicationTimer timer(channel.communicator());
    message.emplace(channel, Op::send, args.rows);
  }
  const RowBlocks& blocks = message->blocks();
  for (int begin = 0; begin < blocks.count;) {
    const int end = blocks.group_end(begin);
    const int64_t first = blocks.begin(begin);
    GemmArgs part = args;
    part.x = static_cast<const std::byte*>(args.x) + first * args.k * size;
    part.rows = blocks.begin(end) - first;
    part.out = message->row(first);
    run_gemm(part, 0, panel_count(n));
    for (int64_t row = first; (bias || residual) && row < first + part.rows; ++row) {
      const void* source = message->row(row);
      kernels().sum({args.dtype, &source, 1, data_or_null(bias),
                     residual ? residual_data + row * row_bytes : nullptr, message->row(row), n});
    }
    const CommunicationTimer timer(channel.communicator());
    for (; begin < end; ++begin) message->publish(begin);
  }
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("matmul_send", &matmul_send); }

}  // namespace commfuse
