#include "vocab_parallel_sample/sample_cuda.h"

namespace commfuse::gpu {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> verify_chain(
    const at::Tensor& logits, const at::Tensor& drafts, const at::Tensor& draft_lengths,
    const std::optional<at::Tensor>& draft_probabilities, const at::Tensor& temperature,
    const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& seed,
    const at::Tensor& position, bool log_probabilities, int64_t vocab_begin, int64_t handle) {
  GpuCall call(logits, handle);
  TORCH_CHECK_VALUE(
      drafts.scalar_type() == at::kLong && drafts.dim() == 2 && drafts.is_contiguous(),
      "drafts is not a contiguous int64 [batch, longest draft]");
  const int64_t batch = drafts.size(0), longest = drafts.size(1);
  TORCH_CHECK_VALUE(draft_lengths.scalar_type() == at::kLong && draft_lengths.dim() == 1 &&
                        draft_lengths.size(0) == batch && draft_lengths.is_contiguous(),
                    "draft_lengths is not a contiguous int64 [", batch, "]");
  check_on_gpu(drafts, logits, "drafts");
  check_on_gpu(draft_lengths, logits, "draft_lengths");
  Draws draws = {};
  set_logits(draws, logits, vocab_begin, batch);
  set_sampling(draws, {temperature, top_k, top_p, seed, position}, logits);
  TORCH_CHECK_VALUE(draws.rows >= batch, "logits has ", draws.rows, " rows for ", batch,
                    " requests, which have one each at least");
  draws.longest = longest;
  draws.drafts = drafts.const_data_ptr<int64_t>();
  draws.draft_lengths = draft_lengths.const_data_ptr<int64_t>();
  if (draft_probabilities && longest > 0 && batch > 0) {
    const at::Tensor& q = *draft_probabilities;
    TORCH_CHECK_VALUE(q.scalar_type() == at::kFloat && q.dim() == 2 && q.is_contiguous() &&
                          q.size(0) >= std::min<int64_t>(1, draws.rows - batch) &&
                          q.size(1) == draws.columns,
                      "draft_probabilities is not a contiguous float32 [drafts of all requests, ",
                      draws.columns, "] (a row for each draft token, this rank's columns)");
    check_on_gpu(q, logits, "draft_probabilities");
    draws.draft_rows = q.size(0);
    draws.draft_probabilities = q.const_data_ptr<float>();
  }
  draws.stream = Stream::target;
  const at::Tensor tokens = at::empty({batch, longest + 1}, drafts.options());
  const at::Tensor accepted = at::empty({batch}, drafts.options());
  const at::Tensor logs =
      at::empty({log_probabilities ? batch : 0, longest + 1}, drafts.options().dtype(at::kFloat));
  draws.tokens = tokens.mutable_data_ptr<int64_t>();
  draws.accepted = accepted.mutable_data_ptr<int64_t>();
  draws.log_probabilities = log_probabilities ? logs.mutable_data_ptr<float>() : nullptr;
  const uint32_t variant = (log_probabilities ? 1 : 0) | (draft_probabilities ? 4 : 0);
  draw_all(call,
           describe(Op::verify_chain, dtype_of_tensor(logits, "logits"),
                    {draws.rows, batch, longest}, variant),
           logits, draws);
  call.wrote({range_of(tokens), range_of(accepted), range_of(logs)});
  return {tokens, accepted, logs};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("verify_chain", &verify_chain); }

}  // namespace commfuse::gpu
