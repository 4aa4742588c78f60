// One rank's end of a group of ranks that share memory, and the calls that are made on it.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/link_model.h"
#include "runtime/protocol.h"
#include "runtime/read_ahead.h"
#include "runtime/segment.h"

namespace commfuse {

namespace gpu {
class Attachment;
}

// Nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
int64_t now_ns();

struct CommunicatorError : std::runtime_error {
  CommunicatorError(Failure failure, const std::string& what)
      : std::runtime_error(what), failure(failure) {}
  Failure failure;
};
// A second call while one is running.
struct ConcurrentUseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Statistics {
  uint64_t calls = 0;       // collective calls (barriers not counted), messages sent or received
  uint64_t bytes_sent = 0;  // published by this rank, times W - 1 receivers
  uint64_t communication_ns = 0;  // waiting for peers, copying and adding their data
};

// What a matmul_all_reduce did when: the evidence that it sends before it has computed everything.
struct TraceEvent {
  enum class Kind : int32_t { computed, published, arrived, reduced };
  int64_t time_ns;
  Kind kind;
  int32_t block;
};

// Nanoseconds of CLOCK_MONOTONIC, from and to.
using Span = std::pair<int64_t, int64_t>;

class Communicator {
 public:
  // A group of one.
  Communicator();
  Communicator(Segment segment, int rank, double timeout_s, LinkModel link);
  ~Communicator();
  Communicator(const Communicator&) = delete;

  int rank() const { return rank_; }
  int world() const { return world_; }
  // Bytes that one call can carry in a phase.
  size_t payload_bytes(int phase) const { return segment_ ? segment_->payload_bytes(phase) : 0; }
  std::byte* workspace(int rank) const { return segment_->workspace(rank); }
  size_t workspace_bytes() const { return segment_ ? segment_->header().workspace_bytes : 0; }
  bool emulated() const { return static_cast<bool>(link_); }

  // The rank that a call is waiting for, and not just briefly; -1: none. Any thread may ask.
  int awaited() const { return awaited_.load(std::memory_order_relaxed); }
  // Throws the recorded error of this communicator, if there is one.
  void check() const;
  // Every rank enters before any rank leaves.
  void barrier();
  // Every rank writes as many bytes for its peers and reads theirs, and that is all: what the way
  // between the cores costs any op whose messages are as large. At most payload_bytes(0).
  void hand_over(size_t bytes);
  // Leaves in order; peers that wait for this rank are told. Calls after it throw.
  void close();

  // Whose ranks its errors are about; empty: it is not said.
  void set_name(std::string name) { name_ = std::move(name); }

  // What to fetch while the next call waits for its peers.
  void read_ahead(const void* data, size_t bytes) { read_ahead_ = ReadAhead(data, bytes); }

  Statistics statistics() const { return statistics_; }
  void reset_statistics() { statistics_ = {}; }
  void start_trace() { trace_.emplace(); }
  std::vector<TraceEvent> stop_trace();
  // Of all communication, collectives and messages, until stop_spans().
  void start_spans() { spans_.emplace(); }
  std::vector<Span> stop_spans();
  // Tests only: this rank sleeps before it publishes, to be a straggler where it hurts most.
  void set_publish_delay_us(int microseconds) { publish_delay_us_ = microseconds; }

  // Its memory on a GPU, for kernels; null without one.
  void attach_gpu(std::shared_ptr<gpu::Attachment> attachment) { gpu_ = std::move(attachment); }
  gpu::Attachment* gpu() const { return gpu_.get(); }
  Segment* segment() { return segment_ ? &*segment_ : nullptr; }
  double timeout_s() const { return timeout_s_; }
  void count_call(uint64_t bytes_sent) {
    ++statistics_.calls;
    statistics_.bytes_sent += bytes_sent;
  }

  // The communicator with this handle; handles are what crosses torch's operator schemas.
  static Communicator& from_handle(int64_t handle);
  int64_t handle() const { return handle_; }

 private:
  friend class Call;
  friend class Message;
  friend class CommunicationTimer;

  void wait(int peer, int phase, int block, uint64_t expected, const Descriptor& mine);
  // The waiting of docs/protocol.md, section 8. there(): whether what is awaited has come;
  // differs(): whether something else stands in its place; fail(why) says so and raises.
  template <class There, class Differs, class Fail>
  void wait_for(int peer, There there, Differs differs, Fail fail);
  [[noreturn]] void raise(const FailureDetails& details);
  void record(const FailureDetails& details) const;
  void watch_peers();

  std::optional<Segment> segment_;
  int rank_ = 0;
  int world_ = 1;
  double timeout_s_ = 30;
  LinkModel link_;
  Egress egress_{LinkModel{}};
  uint64_t generation_ = 0;
  int64_t handle_ = -1;
  std::atomic<bool> busy_{false};
  std::atomic<int> awaited_{-1};
  bool closed_ = false;
  int publish_delay_us_ = 0;
  std::string name_;
  ReadAhead read_ahead_;
  Statistics statistics_;
  std::optional<std::vector<TraceEvent>> trace_;
  std::optional<std::vector<Span>> spans_;
  FileDescriptor stop_watching_;
  std::thread watcher_;
  std::shared_ptr<gpu::Attachment> gpu_;
};

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// An emulated link still carries the message until then.
void hold_until(int64_t deliver_at);

template <class There, class Differs, class Fail>
void Communicator::wait_for(int peer, There there, Differs differs, Fail fail) {
  constexpr int kFastPolls = 1000;
  for (int i = 0; i < kFastPolls; ++i) {
    if (there()) return;
    if (!read_ahead_.step()) pause_briefly();
  }
  awaited_.store(peer, std::memory_order_relaxed);
  const RankArea& area = segment_->area(peer);
  const int64_t deadline = now_ns() + static_cast<int64_t>(timeout_s_ * 1e9);
  for (;;) {
    // Read before the word: who closes or runs out of time does so after its last signal.
    const bool late = now_ns() > deadline;
    const bool closed = area.closed.load(std::memory_order_acquire) != 0;
    if (there()) return awaited_.store(-1, std::memory_order_relaxed);
    check();
    if (differs()) fail(Failure::mismatch);
    if (closed) fail(Failure::closed);
    if (late) fail(Failure::timeout);
    sched_yield();
  }
}

// One call on a communicator, from its generation to its last read. Throws at construction if the
// communicator has failed, is closed, or is in use.
class Call {
 public:
  Call(Communicator& communicator, const Descriptor& descriptor);
  ~Call() { communicator_.busy_.store(false, std::memory_order_release); }
  Call(const Call&) = delete;

  // Where a rank's payload of this call lies.
  std::byte* payload(int rank, int phase) const {
    return communicator_.segment_->payload(rank ^ swapped_, parity_, phase);
  }
  // Makes what this rank has written to its payload, `bytes` of it, visible to all ranks.
  void publish(int phase, int block, size_t bytes);
  // Whether a peer's block is there already; never waits.
  bool arrived(int peer, int phase, int block) const;
  // Waits for one peer's block, or for that of every peer in rank order.
  void wait(int peer, int phase, int block) {
    communicator_.wait(peer, phase, block, word_, descriptor_);
  }
  void wait_all(int phase, int block);

  void trace(TraceEvent::Kind kind, int block);

 private:
  Communicator& communicator_;
  const Descriptor& descriptor_;
  uint64_t generation_ = 0;
  int parity_ = 0;
  int swapped_ = 0;  // 1 where two ranks write to each other's slots (R16)
  uint64_t word_ = 0;
};

// Adds the time until its end to the statistics, and to the spans, as communication.
class CommunicationTimer {
 public:
  explicit CommunicationTimer(Communicator& communicator)
      : communicator_(communicator), begin_(now_ns()) {}
  ~CommunicationTimer() {
    const int64_t end = now_ns();
    communicator_.statistics_.communication_ns += end - begin_;
    if (communicator_.spans_) communicator_.spans_->emplace_back(begin_, end);
  }

 private:
  Communicator& communicator_;
  int64_t begin_;
};

}  // namespace commfuse
