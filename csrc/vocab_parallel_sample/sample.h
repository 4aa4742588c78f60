// Tokens drawn from logits that stay on their ranks: behind vocab_parallel_sample and verify_chain.
//
// A row's token is the argmax over blocks of 128 tokens of log(sum of weights) - log(exponential
// noise), then one draw by weight inside the winning block: together a draw by weight (the
// Gumbel-max trick, applied to sums). Shards are cut between blocks, so that no number on the way
// to a token depends on where.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/tensors.h"
#include "vocab_parallel_sample/noise.h"

namespace commfuse {

struct NoTokenError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "request 1, row 2", as errors name a row of an op.
inline std::string place_of(Op op, int64_t request, int64_t row) {
  const std::string number = std::to_string(request);
  if (op == Op::vocab_parallel_argmax) return "row " + number;
  if (op == Op::vocab_parallel_sample) return "request " + number;
  return "request " + number + ", row " + std::to_string(row);
}
inline NoTokenError no_token(const std::string& place, const char* what) {
  return NoTokenError("the logits of " + place + " are " + what + ": no token can be chosen");
}
inline NoTokenError draft_nan(const std::string& place) {
  return NoTokenError("the draft probabilities of " + place + " are NaN");
}

// How each request's tokens are drawn: one entry per request in every tensor.
struct SamplingTensors {
  const at::Tensor& temperature;  // float64; 0: the largest logit's token
  const at::Tensor& top_k;        // int64; 0: all
  const at::Tensor& top_p;        // float64 in (0, 1]
  const at::Tensor& seed;         // int64
  const at::Tensor& position;     // int64, of the token that the request's first row predicts
};

struct SampleRow {
  int64_t request = 0;
  int64_t row = 0;  // within the request
  double temperature = 0, top_p = 1;
  int64_t top_k = 0;
  uint64_t seed = 0, position = 0;
  // A draft token that was drawn from a distribution: this rank's part of it, and the token.
  bool drafted = false;
  const float* draft_probabilities = nullptr;
  int64_t draft = -1;

  bool greedy() const { return temperature == 0; }
  bool truncated() const { return !greedy() && (top_k > 0 || top_p < 1); }
  float scale() const { return static_cast<float>(1 / temperature); }
};

// The row-th row of a request. Checks the tensors' shapes and dtypes, not their values.
void check_sampling(const SamplingTensors& sampling, int64_t batch);
SampleRow sample_row(const SamplingTensors& sampling, int64_t request, int64_t row);

// Draws every row's token. logits [rows, columns] of this rank start at global id vocab_begin, a
// multiple of 128 unless all rows are greedy. A row with `drafted` yields its draft where that is
// accepted, and else a token of the residual. log_probabilities, unless null: of the tokens, under
// softmax(logits). Throws NoTokenError, on every rank, naming the first row that is NaN, infinite,
// or -inf throughout.
void sample_rows(Communicator& communicator, Op op, Stream stream, const at::Tensor& logits,
                 int64_t vocab_begin, const std::vector<SampleRow>& rows, int64_t* tokens,
                 float* log_probabilities);

}  // namespace commfuse
