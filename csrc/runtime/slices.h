// One phase of a call in slices (R9): while this rank copies one, its peers read the one before.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernel_table.h"
#include "runtime/communicator.h"

namespace commfuse {

// A slice should fit the L1 or L2 cache together with its copy; below it a message is one slice.
constexpr int64_t kSliceBytes = 16 * 1024;

// Every rank gives each peer n elements. store(begin, count) copies what this rank gives into its
// payload, load(begin, count) reads it out of the peers'. Slices are stored in ascending order, and
// none after its own load: the output may be the input.
template <class Store, class Load>
void exchange_in_slices(Call& call, int64_t n, int64_t element_bytes, Store store, Load load) {
  const int64_t least = round_up((n + kMaxBlocks - 1) / kMaxBlocks, kLanes);
  const int64_t length = std::max(least, kSliceBytes / element_bytes);
  const int slices = static_cast<int>(std::max<int64_t>(1, (n + length - 1) / length));
  auto count_of = [&](int s) { return std::min(length, n - s * length); };
  auto publish = [&](int s) {
    store(s * length, count_of(s));
    call.publish(0, s, count_of(s) * element_bytes);
  };
  publish(0);
  for (int s = 0; s < slices; ++s) {
    if (s + 1 < slices) publish(s + 1);
    call.wait_all(0, s);
    load(s * length, count_of(s));
  }
}

}  // namespace commfuse
