#include "runtime/huge_memory.h"

#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <cstddef>
#include <memory>
#include <mutex>

namespace commfuse {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = 8 * kHugePage;
// No more than a cache line, so that a stream runs on from one weight into the next.
constexpr size_t kAlignment = 64;

size_t round_up_to(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

// A mapping that begins and ends at huge pages.
class Chunk {
 public:
  explicit Chunk(size_t bytes) : size_(round_up_to(bytes, kHugePage)) {
    // Mapped a page too large and trimmed: mmap aligns to small pages only.
    const size_t mapped = size_ + kHugePage;
    void* base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, base != MAP_FAILED, "out of memory: ", size_,
                     " bytes for packed weights");
    char* begin = static_cast<char*>(base);
    begin_ = reinterpret_cast<char*>(round_up_to(reinterpret_cast<size_t>(begin), kHugePage));
    if (begin_ > begin) munmap(begin, static_cast<size_t>(begin_ - begin));
    char* end = begin_ + size_;
    if (end < begin + mapped) munmap(end, static_cast<size_t>(begin + mapped - end));
    // Refused where transparent huge pages are switched off: then it is merely slower.
    madvise(begin_, size_, MADV_HUGEPAGE);
  }
  ~Chunk() { munmap(begin_, size_); }
  Chunk(const Chunk&) = delete;

  // The next free bytes, or null if they do not fit any more.
  void* take(size_t bytes) {
    if (used_ + bytes > size_) return nullptr;
    void* p = begin_ + used_;
    used_ += round_up_to(bytes, kAlignment);
    return p;
  }

 private:
  char* begin_;
  size_t size_;
  size_t used_ = 0;
};

std::mutex mutex;
std::weak_ptr<Chunk> open_chunk;  // where small tensors still fit

}  // namespace

at::Tensor huge_empty(int64_t elements, const at::TensorOptions& options) {
  const size_t bytes = static_cast<size_t>(elements) * options.dtype().itemsize();
  std::shared_ptr<Chunk> chunk;
  void* data = nullptr;
  if (bytes > kChunk / 2) {
    chunk = std::make_shared<Chunk>(bytes);
    data = chunk->take(bytes);
  } else {
    const std::lock_guard lock(mutex);
    chunk = open_chunk.lock();
    if (chunk) data = chunk->take(bytes);
    if (!data) {
      chunk = std::make_shared<Chunk>(kChunk);
      data = chunk->take(bytes);
      open_chunk = chunk;
    }
  }
  return at::from_blob(data, {elements}, [chunk](void*) {}, options);
}

}  // namespace commfuse
