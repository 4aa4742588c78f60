// The exchange behind vocab_parallel_argmax and verify_chain: 8 bytes per row and rank.
#pragma once

#include <stdexcept>

#include "runtime/tensors.h"

namespace commfuse {

struct NoTokenError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// winners[row] = the global id of the largest of all ranks' logits, the lowest id among equals.
// logits [rows, columns] of this rank start at global id vocab_begin. Throws NoTokenError,
// on every rank, naming the first row that is NaN or -inf throughout.
void vocab_winners(Communicator& communicator, const Descriptor& descriptor,
                   const at::Tensor& logits, int64_t vocab_begin, int64_t* winners);

}  // namespace commfuse
