// What a kernel on several GPUs works on: the ranks' symmetric memory, how it is laid out, and
// where failures are reported. docs/protocol.md is the text; every rank's memory has the same
// layout, all zero at first:
//
//   abort word    0 while alive, afterwards 1 + the rank that reported a failure
//   claim         0, or 1 once this rank has a failure of its own
//   arrivals      blocks of this rank that have come to a barrier among themselves
//   released      the call whose barrier all of them have passed
//   generations   [block] calls that the block has completed
//   descriptors   [parity][source] what each source called, in flagged units
//   words         [parity][phase][block][source] generation << 16 | tag
//   squares       [row][tile] sums of squares that a rank's blocks exchange among themselves
//   tile words    [parity][phase][source][tile] generation
//   tickets       [request] candidates that this rank's blocks have found for a request's tokens
//   row report    the earliest row from which no token can be drawn
//   lines         [parity][source] flag-in-data: 8-byte units of 4 bytes of data and 4 of flag
//   slots         [parity][phase][source] payload
//   staging       what a bulk all-reduce reads and overwrites in place (one half: such a call ends
//                 with a barrier)
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/protocol.h"

namespace commfuse::gpu {

constexpr int kMaxRanks = 8;   // GPUs that can map each other's memory: those of one host
constexpr int kMaxGrid = 256;  // blocks that wait must all run at once
// Lines of one source: flag-in-data doubles the bytes, so it is for messages that cost latency
// rather than bandwidth.
constexpr int64_t kLineBytes = 4 << 20;
// Of a block that exchanges with so many ranks. Behind a GEMM it takes half of the registers: 64
// for each of 512 threads, or 128 for 256, which what comes of eight ranks needs. A block of the
// next GEMM finds room beside it.
constexpr int most_threads(int world) { return world <= 4 ? 512 : 256; }
constexpr int64_t kSquares = 64 * 1024;  // floats
constexpr int kMaxTiles = 4096;          // of 64 columns
constexpr int kMaxRequests = 1024;       // whose tokens one launch draws

constexpr int64_t kAbort = 0;
constexpr int64_t kClaim = 128;
constexpr int64_t kArrivals = 256;
constexpr int64_t kReleased = 384;
constexpr int64_t kGenerations = 512;
constexpr int64_t kDescriptors = kGenerations + kMaxGrid * 8;
constexpr int64_t kDescriptorBytes = 2 * sizeof(Descriptor);
constexpr int64_t kWords = kDescriptors + 2 * kMaxRanks * kDescriptorBytes;
constexpr int64_t kSquareSums = kWords + int64_t{2} * kPhases * kMaxGrid * kMaxRanks * 8;
constexpr int64_t kTileWords = kSquareSums + kSquares * 4;
constexpr int64_t kTickets = kTileWords + int64_t{2} * kPhases * kMaxRanks * kMaxTiles * 8;
constexpr int64_t kRowReport = kTickets + kMaxRequests * 4;
constexpr int64_t kLines = kRowReport + 128;
static_assert(kDescriptors % 128 == 0 && kWords % 128 == 0 && kLines % 128 == 0);

constexpr int64_t slots_offset(int world) {
  return round_up(kLines + 2 * world * kLineBytes, 4096);
}
constexpr int64_t staging_bytes(int world, int64_t slot_bytes) { return world * slot_bytes; }
constexpr int64_t staging_offset(int world, int64_t slot_bytes) {
  return slots_offset(world) + 2 * kPhases * world * slot_bytes;
}
constexpr int64_t workspace_bytes(int world, int64_t slot_bytes) {
  return staging_offset(world, slot_bytes) + staging_bytes(world, slot_bytes);
}

// A kernel's parameter.
struct Workspace {
  char* base[kMaxRanks];  // every rank's memory, as this rank maps it
  int rank, world;
  int64_t slots_offset;
  int64_t slot_bytes;
  uint64_t timeout_ns;
  // In host memory: set when the host or a rank on the CPU has failed. Read only by slow waits.
  const uint32_t* host_failed;
  GpuReport* report;  // this rank's, in host memory too

  char* staging(int r) const { return base[r] + staging_offset(world, slot_bytes); }
};

// What a kernel announces of its call.
struct Announcement {
  Descriptor descriptor;
  uint16_t tag;

  explicit Announcement(const Descriptor& d) : descriptor(d), tag(d.tag()) {}
};

}  // namespace commfuse::gpu
