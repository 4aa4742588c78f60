#include "gpu/stream_order.h"

#include <array>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace commfuse::gpu {
namespace {

std::mutex mutex;
using Ranges = std::vector<Range>;
std::map<std::pair<int, cudaStream_t>, std::array<Ranges, 2>> last_written;

}  // namespace

void wrote(int device, cudaStream_t stream, std::initializer_list<Range> ranges) {
  const std::lock_guard lock(mutex);
  auto& [before, last] = last_written[{device, stream}];
  before = std::exchange(last, ranges);
}

bool settled(int device, cudaStream_t stream, Range range) {
  const std::lock_guard lock(mutex);
  const auto found = last_written.find({device, stream});
  if (found == last_written.end()) return true;
  const char* begin = static_cast<const char*>(range.begin);
  for (const Ranges& ranges : found->second) {
    for (const Range& other : ranges) {
      const char* start = static_cast<const char*>(other.begin);
      if (begin < start + other.bytes && start < begin + range.bytes) return false;
    }
  }
  return true;
}

}  // namespace commfuse::gpu
