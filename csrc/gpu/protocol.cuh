// The signalling protocol on a GPU: one block's part in one call. The rules (R1...) are those of
// docs/protocol.md. A kernel goes
//
//   Exchange exchange(workspace, blockIdx.x, gridDim.x);
//   if (!exchange.begin()) return;
//   if (blockIdx.x == 0) exchange.announce(announcement);
//   ...store payload into exchange.slot(peer, phase, rank) of every peer...
//   exchange.publish(phase, tag);
//   if (!exchange.await(phase, tag)) return;
//   ...read exchange.slot(rank, phase, source) of every source...
//   exchange.finish();
//
// All threads of the block call every function together, unless it says otherwise.
#pragma once

#include "gpu/workspace.h"

namespace commfuse::gpu {

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* p) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint64_t* p, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

enum class Wait : uint32_t { done, timed_out, aborted };

class Exchange {
 public:
  __device__ Exchange(const Workspace& workspace, int block, int grid)
      : w_(workspace), own_(workspace.base[workspace.rank]), block_(block), grid_(grid) {}

  // False where the communicator has failed: the block must leave and touch no remote memory.
  __device__ bool begin() {
    // Two independent loads by every thread: they are on the way together with the first loads of
    // whatever the kernel reads, and no thread has to hand the values on.
    generation_ = reinterpret_cast<const uint64_t*>(own_ + kGenerations)[block_] + 1;
    const bool dead = load_relaxed(reinterpret_cast<const uint64_t*>(own_ + kAbort)) != 0;
    // Threads must not disagree about an abort word that is being set.
    return !__syncthreads_or(dead);
  }

  __device__ uint64_t generation() const { return generation_; }
  __device__ int parity() const { return static_cast<int>(generation_ & 1); }
  __device__ int rank() const { return w_.rank; }
  __device__ int world() const { return w_.world; }

  // Where `source` puts its payload on rank `owner`.
  __device__ char* slot(int owner, int phase, int source) const {
    const int64_t index = (parity() * kPhases + phase) * w_.world + source;
    return w_.base[owner] + w_.slots_offset + index * w_.slot_bytes;
  }
  // Likewise, for flag-in-data.
  __device__ char* lines(int owner, int source) const {
    return w_.base[owner] + kLines + (parity() * int64_t{w_.world} + source) * kLineBytes;
  }
  // R12: never 0, and different in calls that use the same half.
  __device__ uint32_t flag() const { return 1 + static_cast<uint32_t>(generation_ % 0xffffffffu); }

  // Block 0, before it publishes: tells every peer what this rank called. By its first warp.
  __device__ void announce(const Announcement& announcement) const {
    if (threadIdx.x >= 32) return;
    constexpr int kUnits = sizeof(Descriptor) / 8;
    const uint64_t* from = reinterpret_cast<const uint64_t*>(&announcement.descriptor);
    for (int i = threadIdx.x; i < w_.world * kUnits; i += 32) {
      reinterpret_cast<uint64_t*>(descriptor(i / kUnits, parity(), w_.rank))[i % kUnits] =
          from[i % kUnits];
    }
  }

  // Tells every rank that this block's payload of the phase is stored.
  __device__ void publish(int phase, uint16_t tag) const {
    // R5: the barrier orders all threads' stores before the release, which then publishes them. One
    // thread for each peer: a loop would add their latencies up.
    __syncthreads();
    publish_from_warp(phase, tag);
  }
  // The same for what threads of the first warp have stored, by that warp alone.
  __device__ void publish_from_warp(int phase, uint16_t tag) const {
    if (threadIdx.x < w_.world) {
      store_release(word(threadIdx.x, phase, parity(), w_.rank), generation_ << 16 | tag);
    }
  }

  // Waits until this block of every rank has published the phase. False: a failure, reported to
  // everybody; the block must leave.
  __device__ bool await(int phase, uint16_t tag) const {
    bool failed = false;
    if (threadIdx.x < w_.world) failed = !await_source(threadIdx.x, phase, tag);
    // Also orders every thread's reads of payload after the acquires (R6).
    return !__syncthreads_or(failed);
  }

  // One thread: waits for one source.
  __device__ bool await_source(int source, int phase, uint16_t tag) const {
    const uint64_t* p = word(w_.rank, phase, parity(), source);
    uint64_t seen = 0;
    const Wait outcome = poll([&] {
      seen = load_acquire(p);
      return seen >> 16 == generation_;
    });
    if (outcome == Wait::done) {
      // R10: only block 0 compares tags, since the grids of ranks that disagree may differ.
      if (block_ != 0 || seen == (generation_ << 16 | tag)) return true;
      fail(Failure::mismatch, source, phase, seen);
    } else if (outcome == Wait::timed_out) {
      // The last that the peer has sent may be in the words of the other half.
      const uint64_t before = load_acquire(word(w_.rank, phase, parity() ^ 1, source));
      fail(Failure::timeout, source, phase, seen > before ? seen : before);
    }
    return false;
  }

  // One thread: polls `there()` until it is true. On anything but done, report with fail() (a
  // time-out) or just leave (aborted: somebody has reported already).
  template <class There>
  __device__ Wait poll(There there) const {
    for (int i = 0; i < kFastPolls; ++i) {
      if (there()) return Wait::done;
    }
    const uint64_t begin = now_ns();
    for (;;) {
      // Before the poll: a rank that was stopped past its deadline still takes what has come.
      const bool late = now_ns() - begin > w_.timeout_ns;
      if (there()) return Wait::done;
      if (load_relaxed(reinterpret_cast<const uint64_t*>(own_ + kAbort)) != 0 ||
          load_relaxed(w_.host_failed) != 0) {
        return Wait::aborted;
      }
      if (late) return Wait::timed_out;
    }
  }

  // One thread: reports a failure, unless this rank has one, and ends the call on all ranks.
  __device__ void fail(Failure kind, int peer, int phase, uint64_t seen) const {
    auto* claim = reinterpret_cast<unsigned long long*>(own_ + kClaim);
    if (atomicCAS(claim, 0ull, 1ull) != 0) return;
    FailureDetails& details = w_.report->details;
    details.failure = kind;
    details.rank = w_.rank;
    details.peer = peer;
    details.phase = phase;
    details.block = block_;
    details.generation = generation_;
    details.seen = seen;
    details.mine = *descriptor(w_.rank, parity(), w_.rank);
    details.theirs = *descriptor(w_.rank, parity(), peer);
    store_release(&w_.report->state, 1);  // publishes the report to the hosts of all ranks
    for (int r = 0; r < w_.world; ++r) {
      store_release(reinterpret_cast<uint64_t*>(w_.base[r] + kAbort), 1 + w_.rank);
    }
  }

  // Counts the call, for this block and for those that only a larger grid would have. After the
  // block's last await.
  __device__ void finish() const {
    auto* generations = reinterpret_cast<uint64_t*>(own_ + kGenerations);
    for (int b = block_ + static_cast<int>(threadIdx.x) * grid_; b < kMaxGrid;
         b += static_cast<int>(blockDim.x) * grid_) {
      generations[b] = generation_;
    }
  }

 private:
  static constexpr int kFastPolls = 1000;

  __device__ Descriptor* descriptor(int owner, int parity, int source) const {
    return reinterpret_cast<Descriptor*>(w_.base[owner] + kDescriptors) + parity * kMaxRanks +
           source;
  }
  __device__ uint64_t* word(int owner, int phase, int parity, int source) const {
    const int64_t row = (parity * kPhases + phase) * int64_t{kMaxGrid} + block_;
    return reinterpret_cast<uint64_t*>(w_.base[owner] + kWords) + row * kMaxRanks + source;
  }

  const Workspace& w_;
  char* own_;
  int block_, grid_;
  uint64_t generation_ = 0;
};

}  // namespace commfuse::gpu
