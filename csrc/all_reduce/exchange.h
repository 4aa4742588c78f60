// The exchange behind the all-reduces: every rank's contribution goes through shared memory in
// slices, so that the copying of one slice overlaps with the peers' adding of the one before.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernel_table.h"
#include "runtime/communicator.h"

namespace commfuse {

// out[n] = sum over ranks of x[n] (+ residual[n]); the same bits on every rank. out may be x.
// Messages above the communicator's capacity take several calls.
void all_reduce_sum(Communicator& communicator, const Descriptor& descriptor, DType dtype,
                    const void* x, const void* residual, void* out, int64_t n);

}  // namespace commfuse
