// Verification of chains of draft tokens on vocabulary shards. One-hot drafts: every row draws its
// token from the target, and drafts are accepted as long as they are what was drawn. Drafts with
// distributions: speculative sampling (Leviathan et al., "Fast Inference from Transformers via
// Speculative Decoding", 2023).
#include <ATen/ops/full.h>

#include <tuple>
#include <vector>

#include "vocab_parallel_sample/sample.h"

namespace commfuse {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> verify_chain(
    const at::Tensor& logits, const at::Tensor& drafts, const at::Tensor& draft_lengths,
    const std::optional<at::Tensor>& draft_probabilities, const at::Tensor& temperature,
    const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& seed,
    const at::Tensor& position, bool log_probabilities, int64_t vocab_begin, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  check_matrix(logits, "logits");
  TORCH_CHECK_VALUE(
      drafts.scalar_type() == at::kLong && drafts.dim() == 2 && drafts.is_contiguous(),
      "drafts is not a contiguous int64 [batch, longest draft]");
  const int64_t batch = drafts.size(0), longest = drafts.size(1), columns = logits.size(1);
  TORCH_CHECK_VALUE(draft_lengths.scalar_type() == at::kLong && draft_lengths.dim() == 1 &&
                        draft_lengths.size(0) == batch && draft_lengths.is_contiguous(),
                    "draft_lengths is not a contiguous int64 [", batch, "]");
  const SamplingTensors sampling{temperature, top_k, top_p, seed, position};
  check_sampling(sampling, batch);
  const int64_t* lengths = draft_lengths.const_data_ptr<int64_t>();
  const int64_t* draft = drafts.const_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(lengths[b] >= 0 && lengths[b] <= longest, "draft_lengths[", b, "] is ",
                      lengths[b], ", not in 0..", longest);
    count += lengths[b] + 1;
  }
  TORCH_CHECK_VALUE(logits.size(0) == count, "logits has ", logits.size(0), " rows, not ", count,
                    " (each request's draft length + 1)");
  const float* probabilities = nullptr;
  if (draft_probabilities) {
    const at::Tensor& q = *draft_probabilities;
    TORCH_CHECK_VALUE(q.scalar_type() == at::kFloat && q.dim() == 2 && q.is_contiguous() &&
                          q.size(0) == count - batch && q.size(1) == columns,
                      "draft_probabilities is not a contiguous float32 [", count - batch, ", ",
                      columns, "] (a row for each draft token, this rank's columns)");
    probabilities = q.const_data_ptr<float>();
  }

  std::vector<SampleRow> rows;
  rows.reserve(static_cast<size_t>(count));
  int64_t drafted = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j <= lengths[b]; ++j) {
      SampleRow row = sample_row(sampling, b, j);
      if (draft_probabilities && j < lengths[b]) {
        row.drafted = true;
        row.draft_probabilities = probabilities + drafted++ * columns;
        row.draft = draft[b * longest + j];
      }
      rows.push_back(row);
    }
  }
  std::vector<int64_t> chosen(static_cast<size_t>(count));
  std::vector<float> logs(log_probabilities ? chosen.size() : 0);
  sample_rows(communicator, Op::verify_chain, Stream::target, logits, vocab_begin, rows,
              chosen.data(), log_probabilities ? logs.data() : nullptr);

  at::Tensor tokens = at::full({batch, longest + 1}, -1, drafts.options());
  at::Tensor accepted = empty_output({batch}, at::kLong);
  at::Tensor log_tokens = at::full({log_probabilities ? batch : 0, longest + 1}, 0.0,
                                   drafts.options().dtype(at::kFloat));
  int64_t* out = tokens.mutable_data_ptr<int64_t>();
  int64_t first = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* own = chosen.data() + first;
    int64_t right = 0;
    while (right < lengths[b] && own[right] == draft[b * longest + right]) ++right;
    // The accepted drafts were chosen too; behind them stands the recovery or the bonus token.
    std::copy(own, own + right + 1, out + b * (longest + 1));
    accepted.mutable_data_ptr<int64_t>()[b] = right;
    if (log_probabilities) {
      std::copy(logs.data() + first, logs.data() + first + right + 1,
                log_tokens.mutable_data_ptr<float>() + b * (longest + 1));
    }
    first += lengths[b] + 1;
  }
  return {tokens, accepted, log_tokens};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("verify_chain", &verify_chain); }

}  // namespace commfuse
