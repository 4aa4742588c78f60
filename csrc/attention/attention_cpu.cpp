#include "attention/attention.h"

#include <algorithm>
#include <cmath>

namespace commfuse {
at::Tensor attention(const at::Tensor& qkv, const at::Tensor& k_cache, const at::Tensor& v_cache,
                     const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& sequences,
                     const at::Tensor& positions, int64_t heads, int64_t head_offset, int64_t group,
                     const std::optional<at::Tensor>& q_norm,
                     const std::optional<at::Tensor>& k_norm, double eps) {
  AttentionArgs args{};
  args.dtype = dtype_of_tensor(qkv, "qkv");
  check_matrix(qkv, "qkv");
  TORCH_CHECK_VALUE(v_cache.dim() == 4,
                    "v_cache is not [sequences, kv_heads, max_length, head_dim]");
  args.heads = heads;
  args.kv_heads = v_cache.size(1);
  args.max_length = v_cache.size(2);
  args.head_dim = v_cache.size(3);
  args.head_offset = head_offset;
  args.group = group;
  args.eps = static_cast<float>(eps);
  args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(args.head_dim)));
  TORCH_CHECK_VALUE(args.head_dim % kLanes == 0, "head_dim is ", args.head_dim,
                    "; it must be a multiple of 16");
  TORCH_CHECK_VALUE(args.max_length % kLanes == 0, "max_length is ", args.max_length,
                    "; it must be a multiple of 16");
  TORCH_CHECK_VALUE(heads >= 1 && head_offset >= 0 && group >= 1, "heads are (", heads, ", ",
                    head_offset, ", ", group, "); use (1 or more, 0 or more, 1 or more)");
  const int64_t read = (head_offset + heads - 1) / group - head_offset / group + 1;
  TORCH_CHECK_VALUE(args.kv_heads == read, "v_cache has ", args.kv_heads, " KV heads, and heads ",
                    head_offset, " to ", head_offset + heads - 1, " in groups of ", group, " read ",
                    read);
  check_matches(v_cache, qkv, v_cache.sizes(), "v_cache");
  check_matches(k_cache, qkv, v_cache.sizes(), "k_cache");
  const int64_t tokens = qkv.size(0), dim = args.head_dim;
  TORCH_CHECK_VALUE(qkv.size(1) == (heads + 2 * args.kv_heads) * dim, "qkv has ", qkv.size(1),
                    " columns, not ", (heads + 2 * args.kv_heads) * dim);
  check_matches(cos, sin, {cos.size(0), dim / 2}, "cos");
  check_matches(sin, cos, cos.sizes(), "sin");
  TORCH_CHECK_VALUE(cos.scalar_type() == at::kFloat, "cos is not float32");
  for (const at::Tensor* index : {&sequences, &positions}) {
    TORCH_CHECK_VALUE(index->scalar_type() == at::kLong && index->dim() == 1 &&
                          index->size(0) == tokens && index->is_contiguous(),
                      "sequences and positions must be contiguous int64 [", tokens, "]");
  }
  if (q_norm) check_matches(*q_norm, qkv, {dim}, "q_norm");
  if (k_norm) check_matches(*k_norm, qkv, {dim}, "k_norm");
  const int64_t* sequence = sequences.const_data_ptr<int64_t>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  int64_t longest = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    TORCH_CHECK_VALUE(sequence[t] >= 0 && sequence[t] < v_cache.size(0), "sequences[", t, "] is ",
                      sequence[t], "; the cache holds ", v_cache.size(0));
    TORCH_CHECK_VALUE(position[t] >= 0 && position[t] < std::min(args.max_length, cos.size(0)),
                      "positions[", t, "] is ", position[t], "; the cache holds ",
                      std::min(args.max_length, cos.size(0)));
    longest = std::max(longest, position[t] + 1);
  }
  args.k_cache = k_cache.mutable_data_ptr();
  args.v_cache = v_cache.mutable_data_ptr();
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  args.q_norm = data_or_null(q_norm);
  args.k_norm = data_or_null(k_norm);

  const int64_t size = static_cast<int64_t>(size_of(args.dtype));
  at::Tensor rotated = qkv.clone();
  std::byte* rows = static_cast<std::byte*>(rotated.mutable_data_ptr());
  const int64_t row_bytes = qkv.size(1) * size;
  for (int64_t t = 0; t < tokens; ++t) {
    kernels().attention_append(args, rows + t * row_bytes, sequence[t], position[t]);
  }
  at::Tensor out = empty_output({tokens, heads * dim}, qkv.scalar_type());
  if (out.numel() == 0) return out;
  std::byte* out_rows = static_cast<std::byte*>(out.mutable_data_ptr());
  // Enough for the scores of any group of heads that one kernel call takes together.
  const int64_t scratch = std::min<int64_t>(group, 8) * round_up(longest, kLanes);
  const int64_t grain = std::max<int64_t>(1, 64 * 1024 / (longest * dim * group));
  at::parallel_for(0, tokens * args.kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(static_cast<size_t>(scratch));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / args.kv_heads;
      kernels().attention_token(args, rows + t * row_bytes, sequence[t], position[t],
                                i % args.kv_heads, scores.data(),
                                out_rows + t * heads * dim * size);
    }
  });
  return out;
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("attention", &attention); }

}  // namespace commfuse
