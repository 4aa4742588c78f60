// A stack of transformer blocks in one call: between small ops, the interpreter would take as long
// as the streaming of their weights.
#include <tuple>

#include "attention/attention.h"
#include "matmul/gemm.h"
#include "matmul_all_reduce/matmul_all_reduce.h"
#include "matmul_send/matmul_send.h"
#include "recv_matmul/recv_matmul.h"
#include "send/send.h"

namespace commfuse {
namespace {

using Optional = std::optional<at::Tensor>;
using Optionals = c10::List<Optional>;

void read_ahead(int64_t communicator, const at::Tensor& weights) {
  Communicator::from_handle(communicator).read_ahead(weights.const_data_ptr(), weights.nbytes());
}

std::tuple<at::Tensor, at::Tensor> transformer_blocks(
    const Optional& x, const Optional& residual, at::TensorList k_caches, at::TensorList v_caches,
    const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& sequences,
    const at::Tensor& positions, at::TensorList qkv, const Optionals& qkv_bias,
    at::TensorList output, const Optionals& output_bias, at::TensorList middle_norm,
    at::TensorList gate_up, const Optionals& gate_up_bias, at::TensorList down,
    const Optionals& down_bias, at::TensorList next_norm, const Optionals& q_norm,
    const Optionals& k_norm, const Optional& read_next, int64_t heads, int64_t head_offset,
    int64_t group, int64_t features, double eps, int64_t communicator, const Optional& first_norm,
    std::optional<int64_t> source, std::optional<int64_t> target) {
  const size_t blocks = k_caches.size();
  TORCH_CHECK_VALUE(blocks > 0, "transformer_blocks: no blocks were given");
  for (size_t length :
       {v_caches.size(), qkv.size(), qkv_bias.size(), output.size(), output_bias.size(),
        middle_norm.size(), gate_up.size(), gate_up_bias.size(), down.size(), down_bias.size(),
        next_norm.size(), q_norm.size(), k_norm.size()}) {
    TORCH_CHECK_VALUE(length == blocks, "transformer_blocks: k_caches has ", blocks,
                      " entries, another list ", length, "; every list needs one for each block");
  }
  TORCH_CHECK_VALUE((x && residual) != (source && first_norm),
                    "transformer_blocks: give x and residual, or source and first_norm");
  at::Tensor in, in_residual;
  if (x) {
    check_matrix(*x, "x");
    in = *x, in_residual = *residual;
  }
  const int64_t hidden = middle_norm[0].size(0), gate_up_rows = 2 * round_up(features, kLanes);
  for (size_t b = 0; b < blocks; ++b) {
    const at::Tensor &k_cache = k_caches[b], &v_cache = v_caches[b];
    TORCH_CHECK_VALUE(v_cache.dim() == 4,
                      "v_cache is not [sequences, kv_heads, max_length, head_dim]");
    const int64_t qkv_rows = (heads + 2 * v_cache.size(1)) * v_cache.size(3);

    at::Tensor rows;
    if (b == 0 && source) {
      std::tie(rows, in_residual) =
          recv_matmul(sequences.size(0), *source, qkv[b], qkv_rows, qkv_bias[b], *first_norm, eps);
    } else {
      rows = matmul(in, qkv[b], qkv_rows, qkv_bias[b], false, qkv_rows, false);
    }
    const at::Tensor attended = attention(rows, k_cache, v_cache, cos, sin, sequences, positions,
                                          heads, head_offset, group, q_norm[b], k_norm[b], eps);
    read_ahead(communicator, gate_up[b]);
    const auto [middle, middle_residual] =
        matmul_all_reduce_rms_norm(attended, output[b], hidden, communicator, output_bias[b],
                                   in_residual, middle_norm[b], eps);
    const at::Tensor gated =
        matmul(middle, gate_up[b], gate_up_rows, gate_up_bias[b], true, features, false);
    if (b + 1 < blocks) {
      read_ahead(communicator, qkv[b + 1]);
    } else if (read_next) {
      read_ahead(communicator, *read_next);
    }
    if (b + 1 == blocks && target) {
      if (Communicator::from_handle(communicator).world() == 1) {
        matmul_send(gated, down[b], hidden, *target, down_bias[b], middle_residual);
      } else {
        send(matmul_all_reduce(gated, down[b], hidden, communicator, down_bias[b], middle_residual),
             *target);
      }
      const at::Tensor none = empty_output({0, hidden}, gated.scalar_type());
      return {none, none};
    }
    std::tie(in, in_residual) = matmul_all_reduce_rms_norm(
        gated, down[b], hidden, communicator, down_bias[b], middle_residual, next_norm[b], eps);
  }
  return {in, in_residual};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("transformer_blocks", &transformer_blocks); }

}  // namespace commfuse
