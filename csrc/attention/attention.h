// The launcher of attention, for those who call it from C++.
#pragma once

#include "runtime/tensors.h"

namespace commfuse {

// qkv [tokens, (heads + 2 kv_heads) * head_dim] -> [tokens, heads * head_dim]. Every token's K and
// V are appended before any token attends, so that the tokens of one sequence may come together.
at::Tensor attention(const at::Tensor& qkv, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& sequences,
                     const at::Tensor& positions, int64_t heads, int64_t head_offset, int64_t group,
                     const std::optional<at::Tensor>& q_norm,
                     const std::optional<at::Tensor>& k_norm, double eps);

}  // namespace commfuse
