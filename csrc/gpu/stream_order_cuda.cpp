#include "gpu/stream_order.h"

#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace commfuse::gpu {
namespace {

std::mutex mutex;
std::map<std::pair<int, cudaStream_t>, std::vector<Range>> last_written;

}  // namespace

void wrote(int device, cudaStream_t stream, std::initializer_list<Range> ranges) {
  const std::lock_guard lock(mutex);
  last_written[{device, stream}] = ranges;
}

bool settled(int device, cudaStream_t stream, Range range) {
  const std::lock_guard lock(mutex);
  const auto found = last_written.find({device, stream});
  if (found == last_written.end()) return true;
  const char* begin = static_cast<const char*>(range.begin);
  for (const Range& other : found->second) {
    const char* start = static_cast<const char*>(other.begin);
    if (begin < start + other.bytes && start < begin + range.bytes) return false;
  }
  return true;
}

}  // namespace commfuse::gpu
