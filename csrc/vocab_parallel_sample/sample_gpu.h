// Drawing tokens from vocabulary shards on GPUs; knows no framework.
#pragma once

#include "cpu/dtypes.h"
#include "gpu/call_site.h"
#include "vocab_parallel_sample/noise.h"

namespace commfuse::gpu {

// The best candidate for a row's token among some of its columns, and their normaliser.
struct Candidate {
  double key;
  int32_t id;
  float logit;
  float largest, sum;  // of e^(x - largest)
};

// The rows of all requests, one after the other. Pointers are to memory of the GPU.
struct Draws {
  const void* logits;  // [rows, columns] of this rank
  int64_t rows, columns, vocab_begin;
  int64_t batch, longest;            // longest: of all drafts
  const int64_t* drafts;             // [batch, longest]
  const int64_t* draft_lengths;      // [batch]; null: a row for each request, without drafts
  const float* draft_probabilities;  // [draft_rows, columns] of this rank
  int64_t draft_rows;                // 0: drafts were not drawn
  const double* temperature;         // [batch], and the following; null: the largest logit's
  const int64_t* top_k;
  const double* top_p;
  const int64_t* seed;
  const int64_t* position;
  Stream stream;
  int64_t* tokens;           // [batch, longest + 1]
  int64_t* accepted;         // [batch], or null
  float* log_probabilities;  // [batch, longest + 1], or null
  Candidate* candidates;     // what blocks find
  uint64_t* report;          // in host memory: RowReport
  Op op;
  int64_t begin, count;  // the requests of this launch
};

// What is wrong with a row, in one number: greater ones are those of earlier rows, and of a row the
// one that comes first here. 0: nothing.
enum class RowProblem : uint32_t { draft_nan, nan, infinite, nothing, length };
struct RowReport {
  static constexpr int64_t kMaxRow = 1 << 20;

  COMMFUSE_HOST_DEVICE static uint64_t pack(int64_t request, int64_t row, Op op,
                                            RowProblem problem) {
    return ~(static_cast<uint64_t>(request) << 32 | static_cast<uint64_t>(row) << 12 |
             static_cast<uint64_t>(op) << 4 | static_cast<uint64_t>(problem));
  }
  COMMFUSE_HOST_DEVICE explicit RowReport(uint64_t packed)
      : request(static_cast<int64_t>(~packed >> 32)),
        row(static_cast<int64_t>(~packed >> 12 & (kMaxRow - 1))),
        op(static_cast<Op>(~packed >> 4 & 0xff)),
        problem(static_cast<RowProblem>(~packed & 0xf)) {}
  int64_t request, row;
  Op op;
  RowProblem problem;
};

// Rows that one launch can carry, whatever the number of its requests; and requests.
int64_t sample_row_capacity();
int64_t sample_request_capacity();

// Draws the tokens of `count` requests. candidates must have room for longest + 1 elements for each
// of them, and one for each block of site.max_blocks.
void sample(const CallSite& site, DType dtype, const Draws& draws);

void load_sample();

}  // namespace commfuse::gpu
