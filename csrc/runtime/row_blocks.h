// How the rows of a message are cut into blocks: a function of what both ends of a channel know
// before they exchange it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gpu/host_device.h"

namespace commfuse {

struct RowBlocks {
  int64_t rows, rows_each;
  int count;  // one at least: a message without rows is one as well

  // most: of blocks, for which a slot has words.
  RowBlocks(int64_t all_rows, int64_t row_bytes, int most) : rows(all_rows) {
    // Large enough that a signal costs little beside the copy of what it announces, small enough
    // that on a CPU both copies of a block happen in the caches.
    constexpr int64_t kBlockBytes = 16 * 1024;
    const int64_t least = (rows + most - 1) / most;
    rows_each = std::max<int64_t>({1, least, kBlockBytes / std::max<int64_t>(1, row_bytes)});
    count = static_cast<int>(std::max<int64_t>(1, (rows + rows_each - 1) / rows_each));
  }
  COMMFUSE_HOST_DEVICE int64_t begin(int block) const {
    const int64_t first = block * rows_each;
    return first < rows ? first : rows;
  }
  COMMFUSE_HOST_DEVICE int64_t end(int block) const { return begin(block + 1); }
  // The end of the blocks that a GEMM on the CPU computes together with this one: it reads its
  // weights once for all of them. Two ranks need not group alike.
  int group_end(int block) const {
    return std::min(count, block + static_cast<int>(std::max<int64_t>(1, kGroupRows / rows_each)));
  }

  // A multiple of the GEMM's tiles of six rows and of sixteen. With fewer rows, the reading of
  // large weights would take longer than their multiplication.
  static constexpr int64_t kGroupRows = 96;
};

}  // namespace commfuse
