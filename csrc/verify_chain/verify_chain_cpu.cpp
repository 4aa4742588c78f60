// Greedy verification of chains of draft tokens (Leviathan et al., "Fast Inference from
// Transformers via Speculative Decoding", 2023, at temperature 0) on vocabulary shards.
#include <ATen/ops/full.h>

#include <tuple>
#include <vector>

#include "vocab_parallel_argmax/winner.h"

namespace commfuse {
namespace {

std::tuple<at::Tensor, at::Tensor> verify_chain(const at::Tensor& logits, const at::Tensor& drafts,
                                                const at::Tensor& draft_lengths,
                                                int64_t vocab_begin, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  check_matrix(logits, "logits");
  TORCH_CHECK_VALUE(
      drafts.scalar_type() == at::kLong && drafts.dim() == 2 && drafts.is_contiguous(),
      "drafts is not a contiguous int64 [batch, longest draft]");
  const int64_t batch = drafts.size(0), longest = drafts.size(1);
  TORCH_CHECK_VALUE(draft_lengths.scalar_type() == at::kLong && draft_lengths.dim() == 1 &&
                        draft_lengths.size(0) == batch && draft_lengths.is_contiguous(),
                    "draft_lengths is not a contiguous int64 [", batch, "]");
  const int64_t* lengths = draft_lengths.const_data_ptr<int64_t>();
  const int64_t* draft = drafts.const_data_ptr<int64_t>();
  int64_t rows = 0;
  for (int64_t b = 0; b < batch; ++b) {
    TORCH_CHECK_VALUE(lengths[b] >= 0 && lengths[b] <= longest, "draft_lengths[", b, "] is ",
                      lengths[b], ", not in 0..", longest);
    rows += lengths[b] + 1;
  }
  TORCH_CHECK_VALUE(logits.size(0) == rows, "logits has ", logits.size(0), " rows, not ", rows,
                    " (each request's draft length + 1)");

  std::vector<int64_t> winners(static_cast<size_t>(rows));
  vocab_winners(communicator,
                describe(Op::verify_chain, dtype_of_tensor(logits, "logits"), {rows, batch}),
                logits, vocab_begin, winners.data());
  at::Tensor tokens = at::full({batch, longest + 1}, -1, drafts.options());
  at::Tensor accepted = empty_output({batch}, drafts.scalar_type());
  int64_t* out = tokens.mutable_data_ptr<int64_t>();
  const int64_t* winner = winners.data();
  for (int64_t b = 0; b < batch; ++b) {
    int64_t count = 0;
    while (count < lengths[b] && winner[count] == draft[b * longest + count]) ++count;
    // The accepted drafts are winners too; the one behind them is the recovery or bonus token.
    std::copy(winner, winner + count + 1, out + b * (longest + 1));
    accepted.mutable_data_ptr<int64_t>()[b] = count;
    winner += lengths[b] + 1;
  }
  return {tokens, accepted};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("verify_chain", &verify_chain); }

}  // namespace commfuse
