#include "all_reduce/exchange.h"

#include <algorithm>
#include <cstring>

#include "runtime/slices.h"

namespace commfuse {
namespace {

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
    exchange_in_slices(
        call_, n_, size_,
        [&](int64_t begin, int64_t count) {
          std::memcpy(call_.payload(c_.rank(), 0) + begin * size_, x_ + begin * size_,
                      count * size_);
        },
        [&](int64_t begin, int64_t count) { sum(begin, count, out_ + begin * size_); });
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
