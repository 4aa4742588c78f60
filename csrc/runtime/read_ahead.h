// What a rank does while it waits: fetch the weights that it will read next.
#pragma once

#include <algorithm>
#include <cstddef>

namespace commfuse {

class ReadAhead {
 public:
  ReadAhead() = default;
  // More than fits the L2 cache beside the activations would push itself out again. A prefetch
  // never faults, so that the memory may be gone by the time of the wait.
  ReadAhead(const void* data, size_t bytes)
      : next_(static_cast<const char*>(data)), end_(next_ + std::min(bytes, kMost)) {}

  // Fetches a little; false when there is nothing left to fetch.
  bool step() {
    if (next_ >= end_) return false;
    for (size_t i = 0; i < kStep; i += kLineBytes) __builtin_prefetch(next_ + i, 0, 2);
    next_ += kStep;
    return true;
  }

 private:
  static constexpr size_t kLineBytes = 64, kStep = 4 * kLineBytes, kMost = 512 * 1024;

  const char* next_ = nullptr;
  const char* end_ = nullptr;
};

}  // namespace commfuse
