// The signalling protocol on a GPU: one block's part in one call. The rules (R1...) are those of
// docs/protocol.md. A kernel that exchanges payload in slots goes
//
//   Exchange exchange(workspace, blockIdx.x, gridDim.x);
//   if (!exchange.begin_block()) return;
//   if (blockIdx.x == 0) exchange.announce(announcement);
//   ...store payload into exchange.slot(peer, phase, rank) of every peer...
//   exchange.publish(phase, tag);
//   if (!exchange.await(phase, tag)) return;
//   ...read exchange.slot(rank, phase, source) of every source...
//   exchange.finish();
//
// all threads of the block calling every function together. One that exchanges flag-in-data lines
// (lines.cuh) begins alike; there every thread takes what it needs by itself, and only block 0 has
// a word: announce_with_word() and await_words().
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
__device__ __forceinline__ void store_relaxed(uint64_t* p, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ void store_release(uint64_t* p, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// Among this GPU's blocks; returns what was there before.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* p, uint32_t value) {
  uint32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p), "r"(value)
               : "memory");
  return before;
}
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

// R3: a kernel may be launched before its predecessor in the stream has ended; what it does before
// this must not touch memory that another kernel writes. The successor may be launched from here
// on; with successor_early already when all blocks have come here. That is for a kernel behind a
// GEMM of ours, which itself lets nobody start before it may read x: the next GEMM then takes the
// multiprocessors that this one leaves, block by block, and fetches its weights during the
// exchange. Kernels that all did so would pile up, without end, where a late rank's should run.
__device__ __forceinline__ void wait_for_predecessor(bool successor_early = false) {
#if __CUDA_ARCH__ >= 900
  if (successor_early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (!successor_early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

enum class Wait : uint32_t { done, timed_out, aborted };

// One thread: polls `there()` until it is true. On anything but done, report a failure (a time-out)
// or just leave (aborted: somebody has reported already).
template <class There>
__device__ __forceinline__ Wait poll(const Workspace& w, There there) {
  constexpr int kFastPolls = 1000;
  uint64_t begin = 0;
  for (int i = 0;; ++i) {
    const bool slow = i >= kFastPolls;
    if (i == kFastPolls) begin = now_ns();
    // Before the poll: a rank that was stopped past its deadline still takes what has come.
    const bool late = slow && now_ns() - begin > w.timeout_ns;
    if (there()) return Wait::done;
    if (!slow) continue;
    auto* abort = reinterpret_cast<uint64_t*>(w.base[w.rank] + kAbort);
    if (load_relaxed(abort) != 0) return Wait::aborted;
    if (load_relaxed(w.host_failed) != 0) {
      // The next kernel of this rank, which works in the same generation, must store nothing.
      store_release(abort, 1 + w.rank);
      return Wait::aborted;
    }
    if (late) return Wait::timed_out;
    i = kFastPolls;
  }
}

// One thread: reports a failure, which fill() describes, unless this rank has one, and has the
// kernels of all ranks leave.
template <class Fill>
__device__ __forceinline__ void report_failure(const Workspace& w, Fill fill) {
  auto* claim = reinterpret_cast<unsigned long long*>(w.base[w.rank] + kClaim);
  if (atomicCAS(claim, 0ull, 1ull) != 0) return;
  w.report->details.rank = w.rank;
  fill(w.report->details);
  store_release(&w.report->state, 1);  // publishes the report to the hosts of all ranks
  for (int r = 0; r < w.world; ++r) {
    store_release(reinterpret_cast<uint64_t*>(w.base[r] + kAbort), 1 + w.rank);
  }
}

class Exchange {
 public:
  __device__ Exchange(const Workspace& workspace, int block, int grid)
      : w_(workspace), own_(workspace.base[workspace.rank]), block_(block), grid_(grid) {}

  // One thread. False where the communicator has failed: nothing may be stored remotely.
  __device__ bool begin() {
    // Two independent loads by every thread: they are on the way together with the first loads of
    // whatever the kernel reads, and no thread has to hand the values on.
    generation_ = reinterpret_cast<const uint64_t*>(own_ + kGenerations)[block_] + 1;
    return load_relaxed(reinterpret_cast<const uint64_t*>(own_ + kAbort)) == 0;
  }
  // The block, which must leave together: threads may not disagree about an abort word that is
  // being set.
  __device__ bool begin_block() { return !__syncthreads_or(!begin()); }

  __device__ uint64_t generation() const { return generation_; }
  __device__ int parity() const { return static_cast<int>(generation_ & 1); }
  __device__ int rank() const { return w_.rank; }
  __device__ int world() const { return w_.world; }
  __device__ int block() const { return block_; }
  __device__ int grid() const { return grid_; }

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
  // Likewise, in 16 bits.
  __device__ uint64_t short_flag() const { return 1 + generation_ % 0xffffu; }

  // This rank's [row][tile] sums of squares.
  __device__ float* squares() const { return reinterpret_cast<float*>(own_ + kSquareSums); }

  // Block 0, by its first warp: tells every peer what this rank called. R15: the units carry flags,
  // since no word need publish them.
  __device__ void announce(const Announcement& announcement) const {
    if (threadIdx.x >= 32) return;
    const uint32_t* content = reinterpret_cast<const uint32_t*>(&announcement.descriptor);
    for (int i = threadIdx.x; i < w_.world * kUnits; i += 32) {
      store_relaxed(descriptor(i / kUnits, parity(), w_.rank) + i % kUnits,
                    static_cast<uint64_t>(flag()) << 32 | content[i % kUnits]);
    }
  }
  // Of a call by lines, whose data need no word.
  __device__ void announce_with_word(const Announcement& announcement) const {
    announce(announcement);
    if (threadIdx.x < w_.world) {
      store_relaxed(word(threadIdx.x, 0, parity(), w_.rank), generation_ << 16 | announcement.tag);
    }
  }
  // Block 0, by its first warp: nobody may be two calls ahead (R7), and all must call the same.
  __device__ bool await_words(uint16_t tag) const {
    return threadIdx.x >= w_.world || await_source(threadIdx.x, 0, tag);
  }

  // Tells every rank that this block's payload of the phase is stored.
  __device__ void publish(int phase, uint16_t tag) const {
    // R5: the barrier orders all threads' stores before the release, which then publishes them. One
    // thread for each peer: a loop would add their latencies up.
    __syncthreads();
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
      // R10: only block 0 reports, since the grids of ranks that disagree may differ.
      if (seen == (generation_ << 16 | tag)) return true;
      if (block_ == 0) fail(Failure::mismatch, source, phase, seen);
    } else if (outcome == Wait::timed_out) {
      time_out(source, phase, block_);
    }
    return false;
  }

  // One thread: this rank's part of a tile is in the peer's slot, and visible to whoever comes here
  // behind a barrier.
  __device__ void publish_tile(int peer, int phase, int tile) const {
    store_release(tile_word(peer, phase, w_.rank, tile), generation_);
  }
  // One thread: waits for a tile of one source.
  __device__ bool await_tile(int source, int phase, int tile) const {
    const uint64_t* p = tile_word(w_.rank, phase, source, tile);
    const Wait outcome = poll([&] { return load_acquire(p) == generation_; });
    if (outcome == Wait::timed_out) time_out(source, phase, 0);
    return outcome == Wait::done;
  }

  template <class There>
  __device__ __forceinline__ Wait poll(There there) const {
    return gpu::poll(w_, there);
  }

  // One thread: `source` has not sent in time.
  __device__ void time_out(int source, int phase, int block) const {
    // The last that the peer has sent may be in the words of the other half.
    const uint64_t seen = load_acquire(word_of(w_.rank, phase, parity(), block, source));
    const uint64_t before = load_acquire(word_of(w_.rank, phase, parity() ^ 1, block, source));
    fail(Failure::timeout, source, phase, seen > before ? seen : before);
  }

  // One thread: reports a failure, unless this rank has one, and ends the call on all ranks.
  __device__ __noinline__ void fail(Failure kind, int peer, int phase, uint64_t seen) const {
    report_failure(w_, [&](FailureDetails& details) {
      details.failure = kind;
      details.peer = peer;
      details.phase = phase;
      details.block = block_;
      details.generation = generation_;
      details.seen = seen;
      read_descriptor(w_.rank, &details.mine, kind == Failure::mismatch);
      read_descriptor(peer, &details.theirs, kind == Failure::mismatch);
    });
  }

  // A barrier among this rank's blocks, at most one a call; `synchronise` is the barrier of those
  // threads of a block that take part, thread 0 among them. False: a failure.
  template <class Synchronise>
  __device__ bool meet(Synchronise synchronise, bool* met) const {
    synchronise();
    if (threadIdx.x == 0) {
      auto* arrivals = reinterpret_cast<uint32_t*>(own_ + kArrivals);
      auto* released = reinterpret_cast<uint64_t*>(own_ + kReleased);
      const uint32_t before = add_acquire_release(arrivals, 1);
      *met = true;
      if (before == static_cast<uint32_t>(grid_) - 1) {
        *arrivals = 0;  // for the next call
        store_release(released, generation_);
      } else {
        *met = poll([&] { return load_acquire(released) == generation_; }) == Wait::done;
      }
    }
    synchronise();
    return *met;
  }

  // Counts the call, for this block and for those that only a larger grid would have. By the first
  // `threads` threads, after a barrier behind every thread's begin().
  __device__ void finish(int threads) const {
    auto* generations = reinterpret_cast<uint64_t*>(own_ + kGenerations);
    for (int b = block_ + static_cast<int>(threadIdx.x) * grid_; b < kMaxGrid;
         b += threads * grid_) {
      generations[b] = generation_;
    }
  }
  __device__ void finish() const { finish(static_cast<int>(blockDim.x)); }

 private:
  static constexpr int kUnits = sizeof(Descriptor) / 4;

  __device__ uint64_t* descriptor(int owner, int parity, int source) const {
    return reinterpret_cast<uint64_t*>(w_.base[owner] + kDescriptors +
                                       (parity * kMaxRanks + source) * kDescriptorBytes);
  }
  __device__ uint64_t* word_of(int owner, int phase, int parity, int block, int source) const {
    const int64_t row = (parity * kPhases + phase) * int64_t{kMaxGrid} + block;
    return reinterpret_cast<uint64_t*>(w_.base[owner] + kWords) + row * kMaxRanks + source;
  }
  __device__ uint64_t* word(int owner, int phase, int parity, int source) const {
    return word_of(owner, phase, parity, block_, source);
  }
  __device__ uint64_t* tile_word(int owner, int phase, int source, int tile) const {
    const int64_t row = (parity() * kPhases + phase) * int64_t{kMaxRanks} + source;
    return reinterpret_cast<uint64_t*>(w_.base[owner] + kTileWords) + row * kMaxTiles + tile;
  }
  __device__ void read_descriptor(int source, Descriptor* to, bool whole) const {
    const uint64_t* units = descriptor(w_.rank, parity(), source);
    uint32_t* content = reinterpret_cast<uint32_t*>(to);
    for (int i = 0; i < kUnits; ++i) {
      uint64_t unit = 0;
      poll([&] {
        unit = load_relaxed(units + i);
        return !whole || unit >> 32 == flag();
      });
      content[i] = static_cast<uint32_t>(unit);
    }
  }

  const Workspace& w_;
  char* own_;
  int block_, grid_;
  uint64_t generation_ = 0;
};

}  // namespace commfuse::gpu
