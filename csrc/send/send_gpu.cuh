// Rows go into the target's slot by plain stores, a block of them for each block of the grid, which
// publishes it with a word.
#pragma once

#include "gpu/message.cuh"
#include "gpu/units.cuh"

namespace commfuse::gpu {

constexpr int kSendThreads = 512;

template <class T>
__global__ void __launch_bounds__(kSendThreads, 2)
    send_rows(const __grid_constant__ GpuMessage message, BlockRange range, const T* x,
              const T* residual) {
  constexpr int kElements = 16 / static_cast<int>(sizeof(T));
  MessageEnd end(message);
  wait_for_predecessor();
  if (!end.begin_block() || !end.await_free_block()) return;
  const RowBlocks& blocks = message.blocks;
  for (int b = range.begin + blockIdx.x; b < range.end; b += gridDim.x) {
    const int64_t first = blocks.begin(b), offset = first * message.columns;
    const int64_t n = (blocks.end(b) - first) * message.columns;
    const int64_t units = (n + kElements - 1) / kElements;
    const Units<const T> from(x + offset, n), addend(residual ? residual + offset : nullptr, n);
    const Units<T> to(end.sent_row<T>(first), n);
    move_units(
        units, [&](int64_t j) { return from.load(j); },
        [&](int64_t j, uint4 unit) {
          to.store(j, residual ? sum_of<T>(unit, addend.load(j)) : unit);
        });
    end.finish_sent(b);
  }
}

}  // namespace commfuse::gpu
