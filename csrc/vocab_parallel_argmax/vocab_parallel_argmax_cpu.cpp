#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "vocab_parallel_argmax/winner.h"

namespace commfuse {
namespace {

struct Candidate {
  float score;
  int32_t id;
};

Candidate local_winner(DType dtype, const void* row, int64_t columns, int64_t vocab_begin) {
  // A rank may hold none of the vocabulary.
  Candidate best{-std::numeric_limits<float>::infinity(), std::numeric_limits<int32_t>::max()};
  if (columns == 0) return best;
  int64_t index;
  kernels().argmax(dtype, row, columns, &best.score, &index);
  if (!std::isnan(best.score)) best.id = static_cast<int32_t>(vocab_begin + index);
  return best;
}

at::Tensor vocab_parallel_argmax(const at::Tensor& logits, int64_t vocab_begin, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  check_matrix(logits, "logits");
  at::Tensor out = empty_output({logits.size(0)}, at::kLong);
  vocab_winners(
      communicator,
      describe(Op::vocab_parallel_argmax, dtype_of_tensor(logits, "logits"), {logits.size(0)}),
      logits, vocab_begin, out.mutable_data_ptr<int64_t>());
  return out;
}

}  // namespace

void vocab_winners(Communicator& communicator, const Descriptor& descriptor,
                   const at::Tensor& logits, int64_t vocab_begin, int64_t* winners) {
  const DType dtype = dtype_of_tensor(logits, "logits");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const int64_t row_bytes = columns * static_cast<int64_t>(size_of(dtype));
  const int world = communicator.world(), rank = communicator.rank();
  std::vector<Candidate> best(static_cast<size_t>(rows));
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      best[row] = local_winner(
          dtype, static_cast<const std::byte*>(logits.const_data_ptr()) + row * row_bytes, columns,
          vocab_begin);
    }
  });

  const CommunicationTimer timer(communicator);
  const int64_t capacity =
      world == 1 ? std::max<int64_t>(rows, 1)
                 : static_cast<int64_t>(communicator.payload_bytes(0) / sizeof(Candidate));
  int64_t done = 0;
  do {
    Call call(communicator, descriptor);
    const int64_t count = std::min(capacity, rows - done);
    if (world > 1) {
      const size_t bytes = static_cast<size_t>(count) * sizeof(Candidate);
      if (bytes) std::memcpy(call.payload(rank, 0), best.data() + done, bytes);
      call.publish(0, 0, bytes);
      call.wait_all(0, 0);
      for (int r = 0; r < world; ++r) {
        if (r == rank) continue;
        const Candidate* theirs = reinterpret_cast<const Candidate*>(call.payload(r, 0));
        for (int64_t i = 0; i < count; ++i) {
          Candidate& mine = best[done + i];
          // NaN must survive whichever side it comes from.
          if (std::isnan(theirs[i].score) || theirs[i].score > mine.score ||
              (theirs[i].score == mine.score && theirs[i].id < mine.id)) {
            mine = theirs[i];
          }
        }
      }
    }
    done += count;
  } while (done < rows);

  for (int64_t row = 0; row < rows; ++row) {
    if (std::isnan(best[row].score) || std::isinf(best[row].score)) {
      throw NoTokenError("the logits of row " + std::to_string(row) + " are " +
                         (std::isnan(best[row].score) ? "NaN"
                          : best[row].score > 0       ? "infinite"
                                                      : "-inf throughout") +
                         ": no token can be chosen");
    }
    winners[row] = best[row].id;
  }
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("vocab_parallel_argmax", &vocab_parallel_argmax); }

}  // namespace commfuse
