// Rows of a packed weight: a head and an embedding that are tied need only one copy of it.
#include <ATen/ops/zeros.h>

#include "runtime/tensors.h"

namespace commfuse {
namespace {

// out[i] = row tokens[i] - vocab_begin of the packed weight [n, k], or zero where another rank
// holds it.
at::Tensor embedding_shard(const at::Tensor& tokens, const at::Tensor& weights, int64_t n,
                           int64_t k, int64_t vocab_begin) {
  const DType dtype = dtype_of_tensor(weights, "the packed weight");
  TORCH_CHECK_VALUE(
      tokens.scalar_type() == at::kLong && tokens.dim() == 1 && tokens.is_contiguous(),
      "tokens is not a contiguous int64 [rows]");
  check_matches(weights, weights, {packed_elements(dtype, n, k)}, "the packed weight");
  at::Tensor out = at::zeros({tokens.size(0), k}, weights.options());
  const int64_t k_step = dtype == DType::bfloat16 ? 2 : 1, k_padded = packed_k(dtype, k);
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  auto gather = [&](auto* target, const auto* packed) {
    for (int64_t i = 0; i < tokens.size(0); ++i, target += k) {
      const int64_t row = token[i] - vocab_begin;
      if (row < 0 || row >= n) continue;
      const int64_t column = row / kPanelColumns * kPanelColumns;
      const int64_t width = std::min(kPanelColumns, round_up(n, kLanes) - column);
      const auto* source = packed + column * k_padded + (row - column) * k_step;
      for (int64_t j = 0; j < k; ++j) {
        target[j] = source[j / k_step * width * k_step + j % k_step];
      }
    }
  };
  if (dtype == DType::float32) {
    gather(static_cast<uint32_t*>(out.mutable_data_ptr()),
           static_cast<const uint32_t*>(weights.const_data_ptr()));
  } else {
    gather(static_cast<uint16_t*>(out.mutable_data_ptr()),
           static_cast<const uint16_t*>(weights.const_data_ptr()));
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("embedding_shard", &embedding_shard); }

}  // namespace commfuse
