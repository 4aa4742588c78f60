#include "vocab_parallel_sample/sample.h"

namespace commfuse {
namespace {

at::Tensor vocab_parallel_argmax(const at::Tensor& logits, int64_t vocab_begin, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  check_matrix(logits, "logits");
  std::vector<SampleRow> rows(static_cast<size_t>(logits.size(0)));  // at temperature 0
  for (size_t i = 0; i < rows.size(); ++i) rows[i].request = static_cast<int64_t>(i);
  at::Tensor out = empty_output({logits.size(0)}, at::kLong);
  sample_rows(communicator, Op::vocab_parallel_argmax, Stream::target, logits, vocab_begin, rows,
              out.mutable_data_ptr<int64_t>(), nullptr);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("vocab_parallel_argmax", &vocab_parallel_argmax); }

}  // namespace commfuse
