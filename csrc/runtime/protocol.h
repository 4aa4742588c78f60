// What ranks share: signal words, descriptors, the error record. docs/protocol.md is the text that
// this implements.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "cpu/dtypes.h"

namespace commfuse {

constexpr int kMaxWorld = 64;
constexpr int kMaxBlocks = 64;
constexpr int kPhases = 2;
constexpr size_t kLine = 64;

enum class Op : uint16_t {
  none,
  barrier,
  all_reduce,
  all_reduce_rms_norm,
  matmul_all_reduce,
  vocab_parallel_argmax,
  verify_chain,
  reduce_scatter,
  all_gather,
  vocab_parallel_sample,
  hand_over,
  send,
  recv,
};

const char* name_of(Op op);

// What a call is. Ranks must agree on all of it; when they do not, this is what the error shows.
struct alignas(kLine) Descriptor {
  Op op = Op::none;
  DType dtype = DType::float32;
  uint8_t dims = 0;
  uint32_t variant = 0;  // op-specific: which optional inputs are present
  int64_t shape[6] = {};
  int64_t reserved = 0;

  uint16_t tag() const;     // 16-bit digest, never 0
  std::string str() const;  // "all_reduce bfloat16[4, 4096]"
};
static_assert(sizeof(Descriptor) == kLine);

// One signal, on a cache line of its own: a writer and a poller of different words must not
// contend. deliver_at is published by the word's release store and belongs to the link model.
struct alignas(kLine) Word {
  std::atomic<uint64_t> value;  // generation << 16 | tag
  int64_t deliver_at;           // CLOCK_MONOTONIC ns; 0: at once
};
static_assert(sizeof(Word) == kLine);

constexpr uint64_t word_value(uint64_t generation, uint16_t tag) { return generation << 16 | tag; }
constexpr uint64_t generation_of(uint64_t word) { return word >> 16; }

enum class Failure : uint32_t { none, timeout, mismatch, died, closed };

struct FailureDetails {
  Failure failure;
  int32_t rank;  // who noticed
  int32_t peer;  // about whom
  int32_t phase;
  int32_t block;
  uint64_t generation;
  uint64_t seen;
  Descriptor mine;
  Descriptor theirs;
};

// The first failure of a communicator, written once by whoever wins `state`.
struct ErrorRecord {
  // 0: none, 1: being written, 2: readable. It is also the abort word that waiters poll.
  std::atomic<uint32_t> state;
  double seconds;
  FailureDetails details;

  std::string str() const;
};

// What a kernel of one rank has found; the next host that looks makes it the communicator's error.
struct GpuReport {
  uint32_t state;  // 0: none, 1: readable
  FailureDetails details;
};

// Of one rank: everything that it alone writes.
struct RankArea {
  alignas(kLine) Word words[2][kPhases][kMaxBlocks];
  Descriptor descriptors[2];
  alignas(kLine) std::atomic<uint32_t> closed;  // 1 once the rank has left in order
  alignas(kLine) GpuReport gpu_report;
};

struct SegmentHeader {
  uint64_t bytes;
  int32_t world;
  uint64_t payload_bytes;    // of one half in phase 0
  uint64_t workspace_bytes;  // of one rank, for kernels outside this file
  uint64_t channel_bytes;    // of the channel that a segment of two ranks may carry
  alignas(kLine) ErrorRecord error;
};

}  // namespace commfuse
