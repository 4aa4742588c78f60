#include <algorithm>

#include "vocab_parallel_sample/sample_cuda.h"

namespace commfuse::gpu {

void check_on_gpu(const at::Tensor& x, const at::Tensor& logits, const char* name) {
  TORCH_CHECK_VALUE(x.device() == logits.device(), name, " is on ", x.device(), ", the logits on ",
                    logits.device(), "; of Sampling, to(device) makes a copy there");
}

void set_logits(Draws& draws, const at::Tensor& logits, int64_t vocab_begin, int64_t batch) {
  check_matrix(logits, "logits");
  draws.logits = logits.const_data_ptr();
  draws.rows = logits.size(0);
  draws.columns = logits.size(1);
  draws.vocab_begin = vocab_begin;
  draws.batch = batch;
}

void set_sampling(Draws& draws, const SamplingTensors& sampling, const at::Tensor& logits) {
  check_sampling(sampling, draws.batch);
  check_on_gpu(sampling.temperature, logits, "temperature");
  check_on_gpu(sampling.top_k, logits, "top_k");
  check_on_gpu(sampling.top_p, logits, "top_p");
  check_on_gpu(sampling.seed, logits, "seed");
  check_on_gpu(sampling.position, logits, "positions");
  TORCH_CHECK_VALUE(draws.columns == 0 || draws.vocab_begin % kSampleBlock == 0, "vocab_begin is ",
                    draws.vocab_begin, ": shards must be cut at multiples of ", kSampleBlock,
                    ", so that draws do not depend on the number of ranks");
  draws.temperature = sampling.temperature.const_data_ptr<double>();
  draws.top_k = sampling.top_k.const_data_ptr<int64_t>();
  draws.top_p = sampling.top_p.const_data_ptr<double>();
  draws.seed = sampling.seed.const_data_ptr<int64_t>();
  draws.position = sampling.position.const_data_ptr<int64_t>();
}

void draw_all(GpuCall& call, const Descriptor& descriptor, const at::Tensor& logits, Draws draws) {
  const DType dtype = dtype_of_tensor(logits, "logits");
  const int64_t rows_each = draws.longest + 1;
  TORCH_CHECK_VALUE(rows_each <= sample_row_capacity(), "drafts of ", draws.longest,
                    " tokens: at most ", sample_row_capacity() - 1, " are served");
  const int64_t most = std::min(sample_request_capacity(), sample_row_capacity() / rows_each);
  // By the longest draft: lengths that do not belong to the logits are reported, but their rows
  // have candidates too.
  const int64_t rows = std::min(draws.batch, most) * rows_each;
  const int64_t candidates = rows + call.gpu().max_blocks();
  const at::Tensor scratch = at::empty({candidates * static_cast<int64_t>(sizeof(Candidate))},
                                       logits.options().dtype(at::kByte));
  draws.candidates = reinterpret_cast<Candidate*>(scratch.mutable_data_ptr());
  draws.report = call.gpu().row_report();
  draws.op = descriptor.op;
  const int64_t units = draws.log_probabilities ? 4 : 2;
  draws.begin = 0;
  do {
    draws.count = std::min(most, draws.batch - draws.begin);
    const int64_t sent = std::min(draws.rows, draws.count * rows_each) * units * 8;
    sample(call.enter(descriptor, (call.world() - 1) * sent), dtype, draws);
    draws.begin += draws.count;
  } while (draws.begin < draws.batch);
}

void check_rows(Attachment& attachment) {
  const auto device = static_cast<c10::DeviceIndex>(attachment.device());
  const c10::cuda::CUDAGuard guard(device);
  const uint64_t packed =
      attachment.take_row_report(c10::cuda::getCurrentCUDAStream(device).stream());
  if (!packed) return;
  const RowReport report(packed);
  const std::string place = place_of(report.op, report.request, report.row);
  switch (report.problem) {
    case RowProblem::nan:
      throw no_token(place, "NaN");
    case RowProblem::infinite:
      throw no_token(place, "infinite");
    case RowProblem::nothing:
      throw no_token(place, "-inf throughout");
    case RowProblem::draft_nan:
      throw draft_nan(place);
    case RowProblem::length:
      throw NoTokenError("the draft length of request " + std::to_string(report.request) +
                         " is negative or larger than drafts is wide, or the requests up to it "
                         "have more rows than the logits");
  }
}

namespace {

std::tuple<at::Tensor, at::Tensor> vocab_parallel_sample(
    const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
    const at::Tensor& top_p, const at::Tensor& seed, const at::Tensor& position, bool draft,
    bool log_probabilities, int64_t vocab_begin, int64_t handle) {
  GpuCall call(logits, handle);
  Draws draws = {};
  const int64_t batch = logits.dim() ? logits.size(0) : 0;
  set_logits(draws, logits, vocab_begin, batch);
  set_sampling(draws, {temperature, top_k, top_p, seed, position}, logits);
  draws.stream = draft ? Stream::draft : Stream::target;
  const at::Tensor tokens = at::empty({batch}, seed.options());
  const at::Tensor logs =
      at::empty({log_probabilities ? batch : 0}, logits.options().dtype(at::kFloat));
  draws.tokens = tokens.mutable_data_ptr<int64_t>();
  draws.log_probabilities = log_probabilities ? logs.mutable_data_ptr<float>() : nullptr;
  draw_all(call,
           describe(Op::vocab_parallel_sample, dtype_of_tensor(logits, "logits"), {batch},
                    (log_probabilities ? 1 : 0) | (draft ? 2 : 0)),
           logits, draws);
  call.wrote({range_of(tokens), range_of(logs)});
  return {tokens, logs};
}

}  // namespace

TORCH_LIBRARY_IMPL(commfuse, CUDA, m) { m.impl("vocab_parallel_sample", &vocab_parallel_sample); }

}  // namespace commfuse::gpu
