// Memory for the outputs of ops on the CPU. malloc gives large blocks back to the system when they
// are freed, and the pages of the next one fault anew: 0.5 MB cost 60 to 90 us, as much as a
// quarter of the all-reduce that fills them.
#pragma once

#include <ATen/core/Tensor.h>

namespace commfuse {

// An uninitialised tensor for an op's output, without a second trip through the dispatcher: that
// would be half the time of a small op. Large ones take memory that an earlier output has left.
at::Tensor empty_output(at::IntArrayRef shape, at::ScalarType dtype);

}  // namespace commfuse
