// A transformer block in one call: between five small ops, the interpreter would take as long as
// the streaming of their weights.
#include <tuple>

#include "attention/attention.h"
#include "matmul/gemm.h"
#include "matmul_all_reduce/matmul_all_reduce.h"

namespace commfuse {
namespace {

using Optional = std::optional<at::Tensor>;

void read_ahead(int64_t communicator, const at::Tensor& weights) {
  Communicator::from_handle(communicator).read_ahead(weights.const_data_ptr(), weights.nbytes());
}

std::tuple<at::Tensor, at::Tensor> transformer_block(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& k_cache,
    const at::Tensor& v_cache, const at::Tensor& cos, const at::Tensor& sin,
    const at::Tensor& sequences, const at::Tensor& positions, const at::Tensor& qkv,
    const Optional& qkv_bias, const at::Tensor& output, const Optional& output_bias,
    const at::Tensor& middle_norm, const at::Tensor& gate_up, const Optional& gate_up_bias,
    const at::Tensor& down, const Optional& down_bias, const at::Tensor& next_norm,
    const Optional& q_norm, const Optional& k_norm, const Optional& read_next, int64_t heads,
    int64_t head_offset, int64_t group, int64_t features, double eps, int64_t communicator) {
  check_matrix(x, "x");
  TORCH_CHECK_VALUE(v_cache.dim() == 4,
                    "v_cache is not [sequences, kv_heads, max_length, head_dim]");
  const int64_t hidden = x.size(1);
  const int64_t qkv_rows = (heads + 2 * v_cache.size(1)) * v_cache.size(3);
  const int64_t gate_up_rows = 2 * round_up(features, kLanes);

  const at::Tensor rows = matmul(x, qkv, qkv_rows, qkv_bias, false, qkv_rows, false);
  const at::Tensor attended = attention(rows, k_cache, v_cache, cos, sin, sequences, positions,
                                        heads, head_offset, group, q_norm, k_norm, eps);
  read_ahead(communicator, gate_up);
  const auto [middle, middle_residual] = matmul_all_reduce_rms_norm(
      attended, output, hidden, communicator, output_bias, residual, middle_norm, eps);
  const at::Tensor gated =
      matmul(middle, gate_up, gate_up_rows, gate_up_bias, true, features, false);
  if (read_next) read_ahead(communicator, *read_next);
  return matmul_all_reduce_rms_norm(gated, down, hidden, communicator, down_bias, middle_residual,
                                    next_norm, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("transformer_block", &transformer_block); }

}  // namespace commfuse
