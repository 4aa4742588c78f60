// What this process's GPUs can do to each other's memory.
#pragma once

#include <vector>

namespace commfuse {

struct GpuLink {
  int from, to;
  bool access;           // `from` can map `to`'s memory
  bool native_atomics;   // and use atomics on it
  int performance_rank;  // of the driver: lower is faster
};

// All ordered pairs of visible GPUs. Throws std::runtime_error with CUDA's words.
std::vector<GpuLink> gpu_links();

}  // namespace commfuse
