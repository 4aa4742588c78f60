// An emulated link: what a rank sends is held back by latency + bytes / bandwidth.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace commfuse {

struct LinkModel {
  double latency_ns = 0;
  double bytes_per_ns = 0;  // 0: no link model

  explicit operator bool() const { return bytes_per_ns > 0; }

  int64_t transfer_ns(double bytes) const { return static_cast<int64_t>(bytes / bytes_per_ns); }
};

// A rank's one port: messages leave it one after the other, then travel for the latency.
class Egress {
 public:
  explicit Egress(LinkModel model) : model_(model) {}

  // When a message handed over now has arrived everywhere.
  int64_t deliver_at(int64_t now_ns, double bytes) {
    free_at_ = std::max(free_at_, now_ns) + model_.transfer_ns(bytes);
    return free_at_ + static_cast<int64_t>(model_.latency_ns);
  }

 private:
  LinkModel model_;
  int64_t free_at_ = 0;
};

}  // namespace commfuse
