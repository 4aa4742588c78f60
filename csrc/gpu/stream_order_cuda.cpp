#include "gpu/stream_order.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace commfuse::gpu {
namespace {

// Beyond it nothing counts as settled: a long series of kernels that all allow their successor at
// once, which nothing ends.
constexpr size_t kMostRanges = 64;

std::mutex mutex;
// What the kernels write that may still run when the next one starts.
std::map<std::pair<int, cudaStream_t>, std::vector<Range>> being_written;

}  // namespace

void wrote(int device, cudaStream_t stream, Allows allows, std::initializer_list<Range> ranges) {
  const std::lock_guard lock(mutex);
  std::vector<Range>& all = being_written[{device, stream}];
  if (allows == Allows::when_predecessors_have_ended) all.clear();
  if (all.size() < kMostRanges) all.insert(all.end(), ranges);
}

bool settled(int device, cudaStream_t stream, Range range) {
  const std::lock_guard lock(mutex);
  const auto found = being_written.find({device, stream});
  if (found == being_written.end()) return true;
  if (found->second.size() >= kMostRanges) return false;
  const char* begin = static_cast<const char*>(range.begin);
  for (const Range& other : found->second) {
    const char* start = static_cast<const char*>(other.begin);
    if (begin < start + other.bytes && start < begin + range.bytes) return false;
  }
  return true;
}

}  // namespace commfuse::gpu
