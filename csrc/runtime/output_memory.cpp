#include "runtime/output_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace commfuse {
namespace {

// Smaller ones stay in malloc's heap.
constexpr size_t kLeastBytes = 64 << 10;
// Sizes are rounded up to these, so that batches of nearly the same size share memory.
constexpr size_t kGranule = 64 << 10;
constexpr size_t kMostKept = 64 << 20;

class OutputAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeastBytes) return c10::GetCPUAllocator()->allocate(bytes);
    bytes = (bytes + kGranule - 1) / kGranule * kGranule;
    Block* block = take(bytes);
    if (!block) {
      void* data = std::aligned_alloc(64, bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, data, "out of memory: ", bytes, " bytes for an output");
      block = new Block{data, bytes};
    }
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  Block* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    std::vector<Block*>& free = free_[bytes];
    if (free.empty()) return nullptr;
    Block* block = free.back();
    free.pop_back();
    kept_ -= bytes;
    return block;
  }

  static void give_back(void* context);

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<Block*>> free_;
  size_t kept_ = 0;
};

OutputAllocator& allocator() {
  // Never destroyed: outputs may outlive everything.
  static OutputAllocator* const instance = new OutputAllocator;
  return *instance;
}

void OutputAllocator::give_back(void* context) {
  Block* block = static_cast<Block*>(context);
  OutputAllocator& self = allocator();
  {
    const std::lock_guard lock(self.mutex_);
    if (self.kept_ + block->bytes <= kMostKept) {
      self.kept_ += block->bytes;
      self.free_[block->bytes].push_back(block);
      return;
    }
  }
  std::free(block->data);
  delete block;
}

}  // namespace

at::Tensor empty_output(at::IntArrayRef shape, at::ScalarType dtype) {
  return at::detail::empty_generic(shape, &allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   dtype, std::nullopt);
}

}  // namespace commfuse
