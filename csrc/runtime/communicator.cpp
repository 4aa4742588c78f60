#include "runtime/communicator.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "cpu/kernel_table.h"

namespace commfuse {
namespace {

// Handles are never used again, so that a stale one cannot reach a newer communicator.
std::mutex registry_mutex;
std::vector<Communicator*> registry;

}  // namespace

// Ranks may outnumber cores: only the last stretch is spun through.
void hold_until(int64_t deliver_at) {
  constexpr int64_t kSpinNs = 50'000;
  for (int64_t now = now_ns(); now < deliver_at; now = now_ns()) {
    if (deliver_at - now > kSpinNs) {
      sched_yield();
    } else {
      pause_briefly();
    }
  }
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

Communicator& Communicator::from_handle(int64_t handle) {
  const std::lock_guard lock(registry_mutex);
  if (handle < 0 || handle >= static_cast<int64_t>(registry.size()) || !registry[handle]) {
    throw CommunicatorError(Failure::closed, "no communicator has the handle " +
                                                 std::to_string(handle) +
                                                 ": it was closed, or never made");
  }
  return *registry[handle];
}

Communicator::Communicator() {
  const std::lock_guard lock(registry_mutex);
  handle_ = static_cast<int64_t>(registry.size());
  registry.push_back(this);
}

Communicator::Communicator(Segment segment, int rank, double timeout_s, LinkModel link)
    : Communicator() {
  segment_.emplace(std::move(segment));
  rank_ = rank;
  world_ = segment_->header().world;
  timeout_s_ = timeout_s;
  link_ = link;
  egress_ = Egress(link);
  stop_watching_ = FileDescriptor(eventfd(0, EFD_CLOEXEC));
  watcher_ = std::thread([this] { watch_peers(); });
}

Communicator::~Communicator() {
  close();
  const std::lock_guard lock(registry_mutex);
  registry[handle_] = nullptr;
}

void Communicator::close() {
  if (closed_) return;
  closed_ = true;
  if (!segment_) return;
  segment_->area(rank_).closed.store(1, std::memory_order_release);
  const uint64_t one = 1;
  if (write(stop_watching_.get(), &one, sizeof one) == static_cast<ssize_t>(sizeof one)) {
    watcher_.join();
  } else {
    watcher_.detach();
  }
}

// A peer's end of the socket closes when its process ends, however it ends.
void Communicator::watch_peers() {
  std::vector<pollfd> polled{{stop_watching_.get(), POLLIN, 0}};
  for (const FileDescriptor& connection : segment_->connections()) {
    polled.push_back({connection.get(), POLLIN, 0});
  }
  for (;;) {
    if (poll(polled.data(), polled.size(), -1) < 0) continue;
    if (polled[0].revents) return;
    for (size_t i = 1; i < polled.size(); ++i) {
      if (!polled[i].revents) continue;
      polled[i].fd = -1;
      const int peer = segment_->peers()[i - 1];
      if (!segment_->area(peer).closed.load(std::memory_order_acquire)) {
        record({Failure::died, rank_, peer, 0, 0, 0, 0, Descriptor{}, Descriptor{}});
      }
    }
  }
}

void Communicator::record(const FailureDetails& details) const {
  ErrorRecord& error = segment_->header().error;
  uint32_t none = 0;
  if (!error.state.compare_exchange_strong(none, 1, std::memory_order_acq_rel)) return;
  error.seconds = timeout_s_;
  error.details = details;
  error.state.store(2, std::memory_order_release);  // publishes the record to whoever polls state
}

void Communicator::check() const {
  if (closed_) {
    throw CommunicatorError(Failure::closed,
                            "this communicator is closed; make a new Communicator");
  }
  if (!segment_) return;
  for (int r = 0; gpu_ && r < world_; ++r) {
    GpuReport& report = segment_->area(r).gpu_report;
    // Acquire: what the kernel wrote before its release store of the state.
    if (std::atomic_ref(report.state).load(std::memory_order_acquire)) record(report.details);
  }
  const ErrorRecord& error = segment_->header().error;
  if (error.state.load(std::memory_order_relaxed) == 0) return;
  // The writer is between two stores, or was killed there; then what stands is all there is.
  for (int i = 0; i < 1000 && error.state.load(std::memory_order_acquire) != 2; ++i) sched_yield();
  throw CommunicatorError(error.details.failure,
                          (name_.empty() ? "" : "among the " + name_ + ", ") + error.str());
}

void Communicator::raise(const FailureDetails& details) {
  record(details);
  check();
  std::abort();  // check() throws: the record is written
}

void Communicator::wait(int peer, int phase, int block, uint64_t expected, const Descriptor& mine) {
  const uint64_t generation = generation_of(expected);
  const RankArea& area = segment_->area(peer);
  const Word& word = area.words[generation % 2][phase][block];
  wait_for(
      peer,
      // Acquire: what the peer wrote before its release store of this word is now visible.
      [&] { return word.value.load(std::memory_order_acquire) == expected; },
      [&] {
        // Acquire: of a word that differs, the descriptor is read.
        const uint64_t seen = word.value.load(std::memory_order_acquire);
        return seen != expected && generation_of(seen) == generation;
      },
      [&](Failure failure) {
        uint64_t seen = word.value.load(std::memory_order_relaxed);
        if (failure == Failure::timeout) {
          // The peer's last call may stand in the other half.
          const Word& other = area.words[(generation + 1) % 2][phase][block];
          seen = std::max(seen, other.value.load(std::memory_order_relaxed));
        }
        raise({failure, rank_, peer, phase, block, generation, seen, mine,
               area.descriptors[generation % 2]});
      });
  if (link_) hold_until(word.deliver_at);
}

std::vector<TraceEvent> Communicator::stop_trace() {
  std::vector<TraceEvent> events = trace_ ? std::move(*trace_) : std::vector<TraceEvent>{};
  trace_.reset();
  return events;
}

std::vector<Span> Communicator::stop_spans() {
  std::vector<Span> spans = spans_ ? std::move(*spans_) : std::vector<Span>{};
  spans_.reset();
  return spans;
}

void Communicator::barrier() {
  Descriptor descriptor;
  descriptor.op = Op::barrier;
  Call call(*this, descriptor);
  if (world_ == 1) return;
  call.publish(0, 0, 0);
  call.wait_all(0, 0);
}

void Communicator::hand_over(size_t bytes) {
  Descriptor descriptor;
  descriptor.op = Op::hand_over;
  descriptor.dims = 1;
  descriptor.shape[0] = static_cast<int64_t>(bytes);
  Call call(*this, descriptor);
  if (world_ == 1) return;
  std::memset(call.payload(rank_, 0), static_cast<int>(generation_ & 0x3f), bytes);
  call.publish(0, 0, bytes);
  for (int peer = 0; peer < world_; ++peer) {
    if (peer == rank_) continue;
    call.wait(peer, 0, 0);
    // In groups of four lines; a slot ends with a page.
    kernels().read_memory(call.payload(peer, 0), round_up(bytes, 4 * kLine));
  }
}

Call::Call(Communicator& communicator, const Descriptor& descriptor)
    : communicator_(communicator), descriptor_(descriptor) {
  if (communicator.busy_.exchange(true, std::memory_order_acquire)) {
    throw ConcurrentUseError(
        std::string("a second stream of calls on one communicator: ") + descriptor.str() +
        " began while another thread's call was running. One communicator serves one stream; "
        "make a second Communicator for the other");
  }
  try {
    communicator.check();
  } catch (...) {
    communicator.busy_.store(false, std::memory_order_release);
    throw;
  }
  if (descriptor.op != Op::barrier) ++communicator.statistics_.calls;
  if (communicator.world_ == 1) return;
  generation_ = ++communicator.generation_;
  parity_ = static_cast<int>(generation_ % 2);
  if (communicator.world_ == 2) swapped_ = static_cast<int>(generation_ / 2 % 2);
  word_ = word_value(generation_, descriptor.tag());
  communicator.segment_->area(communicator.rank_).descriptors[parity_] = descriptor;
}

void Call::publish(int phase, int block, size_t bytes) {
  Communicator& c = communicator_;
  if (c.publish_delay_us_) usleep(static_cast<useconds_t>(c.publish_delay_us_));
  c.statistics_.bytes_sent += bytes * static_cast<size_t>(c.world_ - 1);
  Word& word = c.segment_->area(c.rank_).words[parity_][phase][block];
  if (c.link_) {
    word.deliver_at = c.egress_.deliver_at(now_ns(), static_cast<double>(bytes) * (c.world_ - 1));
  }
  trace(TraceEvent::Kind::published, block);
  // Release: this rank's payload and descriptor, written before, become visible to every rank that
  // sees the word.
  word.value.store(word_, std::memory_order_release);
}

bool Call::arrived(int peer, int phase, int block) const {
  const Word& word = communicator_.segment_->area(peer).words[parity_][phase][block];
  return word.value.load(std::memory_order_acquire) == word_ &&
         (!communicator_.link_ || now_ns() >= word.deliver_at);
}

void Call::wait_all(int phase, int block) {
  for (int peer = 0; peer < communicator_.world_; ++peer) {
    if (peer != communicator_.rank_) wait(peer, phase, block);
  }
  trace(TraceEvent::Kind::arrived, block);
}

void Call::trace(TraceEvent::Kind kind, int block) {
  if (communicator_.trace_) communicator_.trace_->push_back({now_ns(), kind, block});
}

}  // namespace commfuse
