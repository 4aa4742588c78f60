// One end of a message between GPUs, as a block of a kernel sees it. The source:
//
//   MessageEnd end(message);
//   if (!end.begin_block()) return;
//   if (!end.await_free_block()) return;
//   for each of its blocks of rows
//     ...store it from end.sent_row<T>(row) on...
//     end.finish_sent(block);
//
// and the target:
//
//   MessageEnd end(message);
//   if (!end.begin_block()) return;
//   for each of its blocks of rows
//     if (!end.await_block(block)) return;
//     ...read it from end.received_row<T>(row) on...
//     end.finish_read();
//
// all threads of the block calling every function together. Which block of which grid works on
// which rows is free, and may differ between the ends and between the kernels of a message; but
// every block of a grid has some: then none can begin when the message has been counted.
#pragma once

#include "gpu/message.h"
#include "gpu/protocol.cuh"

namespace commfuse::gpu {

class MessageEnd {
 public:
  __device__ explicit MessageEnd(const GpuMessage& message) : m_(message) {}

  // Every thread. False where the communicator has failed: nothing may be stored remotely.
  __device__ bool begin() {
    number_ = load_relaxed(counter(m_.own, kMessages)) + 1;
    return alive();
  }
  __device__ bool begin_block() { return !__syncthreads_or(!begin()); }
  __device__ bool alive() const {
    return load_relaxed(counter(m_.workspace.base[m_.workspace.rank], kAbort)) == 0;
  }

  // A row in the target's slot, as the source and as the target see it.
  template <class T>
  __device__ T* sent_row(int64_t row) const {
    return reinterpret_cast<T*>(slot(m_.peers)) + row * m_.columns;
  }
  template <class T>
  __device__ const T* received_row(int64_t row) const {
    return reinterpret_cast<const T*>(slot(m_.own)) + row * m_.columns;
  }

  // One thread of the source: waits until the target has read what the slot held.
  __device__ bool await_free() const {
    const uint64_t slots = static_cast<uint64_t>(m_.slots);
    if (number_ <= slots) return true;
    const uint64_t least = number_ - slots;
    const uint64_t* consumed = counter(m_.own, kConsumed);
    uint64_t seen = 0;
    const Wait outcome = poll(m_.workspace, [&] {
      seen = load_acquire(consumed);  // the target's last load lies before its release
      return seen >= least;
    });
    if (outcome == Wait::timed_out) fail(Failure::timeout, 0, seen);
    return outcome == Wait::done;
  }
  __device__ bool await_free_block() const {
    const bool failed = threadIdx.x == 0 && !await_free();
    return !__syncthreads_or(failed);
  }

  // The source: all threads have stored a block of rows.
  __device__ void finish_sent(int block) const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (block == 0) *descriptor(m_.peers) = m_.descriptor;
    // R5: the block's rows, and the descriptor, become visible to whoever sees the word.
    store_release(word(m_.peers, block), value());
    arrive(m_.blocks.count);
  }
  // One thread of the source, behind a barrier of its block, where each block of the grid has
  // stored some columns of all rows: whoever comes last of `parts` publishes the message.
  __device__ void finish_sent_part(int parts) const {
    if (!arrive(parts)) return;
    *descriptor(m_.peers) = m_.descriptor;
    // A fence and relaxed stores are a release each, of what the other blocks have stored too:
    // this thread has acquired their arrivals.
    __threadfence_system();
    for (int b = 0; b < m_.blocks.count; ++b) {
      store_relaxed(word(m_.peers, b), value());
    }
  }

  // One thread of the target: waits for a block of rows.
  __device__ bool await_word(int block) const {
    const uint64_t* p = word(m_.own, block);
    uint64_t seen = 0;
    const Wait outcome = poll(m_.workspace, [&] {
      seen = load_acquire(p);
      return seen >> 16 == number_;
    });
    if (outcome == Wait::done) {
      if (seen == value()) return true;
      // R10: ends that disagree may have different blocks, but each has the first.
      if (block == 0) fail(Failure::mismatch, block, seen);
    } else if (outcome == Wait::timed_out) {
      fail(Failure::timeout, block, last_begun());
    }
    return false;
  }
  __device__ bool await_block(int block) const {
    const bool failed = threadIdx.x == 0 && !await_word(block);
    return !__syncthreads_or(failed);  // R6: also orders every thread's reads after the acquire
  }

  // The target: all threads have read a block of rows.
  __device__ void finish_read() const {
    __syncthreads();
    // The release orders all blocks' loads of the slot, as they have arrived, before the word.
    if (threadIdx.x == 0 && arrive(m_.blocks.count)) {
      store_release(counter(m_.peers, kConsumed), number_);
    }
  }

 private:
  __device__ static uint64_t* counter(char* memory, int64_t offset) {
    return reinterpret_cast<uint64_t*>(memory + offset);
  }
  __device__ char* head(char* memory, int slot) const {
    return memory + kSlotHeads + slot * kSlotHeadBytes;
  }
  __device__ int slot_index() const {
    return static_cast<int>(number_ % static_cast<uint64_t>(m_.slots));
  }
  __device__ char* slot(char* memory) const {
    return memory + m_.slots_offset + slot_index() * m_.slot_bytes;
  }
  __device__ uint64_t* word(char* memory, int block) const {
    return reinterpret_cast<uint64_t*>(head(memory, slot_index())) + block;
  }
  __device__ Descriptor* descriptor(char* memory) const {
    return reinterpret_cast<Descriptor*>(head(memory, slot_index()) + kMessageBlocks * 8);
  }
  __device__ uint64_t value() const { return number_ << 16 | m_.tag; }
  // The last message whose first block has come, in whatever slot.
  __device__ uint64_t last_begun() const {
    uint64_t last = 0;
    for (int s = 0; s < m_.slots; ++s) {
      const uint64_t seen = load_acquire(reinterpret_cast<const uint64_t*>(head(m_.own, s))) >> 16;
      if (seen > last) last = seen;
    }
    return last;
  }

  // One thread for each part of a message. True for the last one, which has counted the message.
  __device__ bool arrive(int parts) const {
    // At system scope: whoever is last speaks for what the others have stored on the peer.
    uint32_t before;
    asm volatile("atom.add.acq_rel.sys.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(m_.own + kMessageArrivals)
                 : "memory");
    if (before != static_cast<uint32_t>(parts) - 1) return false;
    *reinterpret_cast<uint32_t*>(m_.own + kMessageArrivals) = 0;  // for the next message
    *counter(m_.own, kMessages) = number_;
    return true;
  }

  __device__ __noinline__ void fail(Failure kind, int block, uint64_t seen) const {
    report_failure(m_.workspace, [&](FailureDetails& details) {
      details.failure = kind;
      details.peer = m_.peer;
      details.phase = 0;
      details.block = block;
      details.generation = number_;
      details.seen = seen;
      details.mine = m_.descriptor;
      // Of a mismatch, the source's, which the word has published.
      details.theirs = *descriptor(m_.own);
    });
  }

  const GpuMessage& m_;
  uint64_t number_ = 0;
};

}  // namespace commfuse::gpu
