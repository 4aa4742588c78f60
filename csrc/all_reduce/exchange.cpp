#include "all_reduce/exchange.h"

#include <algorithm>
#include <cstring>

namespace commfuse {
namespace {

// A slice should fit the L1 or L2 cache together with its copy; below it a message is one slice.
constexpr size_t kSliceBytes = 16 * 1024;
// From here on two-shot's 2 (W - 1) / W messages cost less than one-shot's W - 1. With two ranks
// both move the same bytes and one-shot has one wait fewer.
constexpr size_t kTwoShotBytes = 64 * 1024;

class Exchange {
 public:
  Exchange(Communicator& communicator, Call& call, DType dtype, const std::byte* x,
           const std::byte* residual, std::byte* out, int64_t n)
      : c_(communicator),
        call_(call),
        dtype_(dtype),
        size_(size_of(dtype)),
        x_(x),
        residual_(residual),
        out_(out),
        n_(n) {}

  void one_shot() {
    const int64_t slice = slice_elements(n_);
    const int slices = slice_count(n_, slice);
    push(0, slice);
    for (int s = 0; s < slices; ++s) {
      if (s + 1 < slices) push(s + 1, slice);
      call_.wait_all(0, s);
      const int64_t begin = s * slice;
      sum(begin, std::min(slice, n_ - begin), out_ + begin * size_);
    }
  }

  // Phase 0: everybody's data is there, each rank adds its part. Phase 1: the parts are collected.
  void two_shot() {
    const int world = c_.world(), rank = c_.rank();
    const int64_t part = round_up((n_ + world - 1) / world, kLanes);
    auto begin_of = [&](int r) { return std::min(part * r, n_); };
    auto count_of = [&](int r) { return begin_of(r + 1) - begin_of(r); };
    std::memcpy(call_.payload(rank, 0), x_, n_ * size_);
    call_.publish(0, 0, (n_ - count_of(rank)) * size_ / std::max(1, world - 1));
    call_.wait_all(0, 0);
    sum(begin_of(rank), count_of(rank), call_.payload(rank, 1));
    call_.publish(1, 0, count_of(rank) * size_);
    for (int r = 0; r < world; ++r) {
      if (r != rank) call_.wait(r, 1, 0);
      std::memcpy(out_ + begin_of(r) * size_, call_.payload(r, 1), count_of(r) * size_);
    }
  }

 private:
  int64_t slice_elements(int64_t n) const {
    const int64_t least = round_up((n + kMaxBlocks - 1) / kMaxBlocks, kLanes);
    return std::max<int64_t>(least, kSliceBytes / size_);
  }
  static int slice_count(int64_t n, int64_t slice) {
    return static_cast<int>(std::max<int64_t>(1, (n + slice - 1) / slice));
  }
  void push(int s, int64_t slice) {
    const int64_t begin = s * slice, count = std::min(slice, n_ - begin);
    std::memcpy(call_.payload(c_.rank(), 0) + begin * size_, x_ + begin * size_, count * size_);
    call_.publish(0, s, count * size_);
  }
  void sum(int64_t begin, int64_t count, std::byte* out) const {
    const void* sources[kMaxWorld];
    for (int r = 0; r < c_.world(); ++r) {
      sources[r] = (r == c_.rank() ? x_ : call_.payload(r, 0)) + begin * size_;
    }
    kernels().sum({dtype_, sources, c_.world(), nullptr,
                   residual_ ? residual_ + begin * size_ : nullptr, out, count});
  }

  Communicator& c_;
  Call& call_;
  DType dtype_;
  int64_t size_;
  const std::byte* x_;
  const std::byte* residual_;
  std::byte* out_;
  int64_t n_;
};

}  // namespace

void all_reduce_sum(Communicator& communicator, const Descriptor& descriptor, DType dtype,
                    const void* x, const void* residual, void* out, int64_t n) {
  const int64_t size = static_cast<int64_t>(size_of(dtype));
  const CommunicationTimer timer(communicator);
  if (communicator.world() == 1) {
    const Call call(communicator, descriptor);
    kernels().sum({dtype, &x, 1, nullptr, residual, out, n});
    return;
  }
  const int64_t capacity = static_cast<int64_t>(communicator.payload_bytes(0)) / size;
  int64_t done = 0;
  do {
    const int64_t count = std::min(capacity, n - done);
    auto at = [&](const void* p) {
      return p ? static_cast<const std::byte*>(p) + done * size : nullptr;
    };
    Call call(communicator, descriptor);
    Exchange exchange(communicator, call, dtype, at(x), at(residual),
                      static_cast<std::byte*>(out) + done * size, count);
    // Two-shot adds the residual where the sum is made, so every rank must hold the same one.
    if (communicator.world() > 2 && count * size >= static_cast<int64_t>(kTwoShotBytes)) {
      exchange.two_shot();
    } else {
      exchange.one_shot();
    }
    done += count;
  } while (done < n);
}

}  // namespace commfuse
