// Flag-in-data: a line of 16 bytes carries a pack of 8 bytes, in two units of 4 bytes of data and
// the call's flag, each stored and loaded as one. The reader polls the data itself, so that no
// release, acquire or barrier stands between (docs/protocol.md, section 6).
#pragma once

#include "gpu/numbers.cuh"
#include "gpu/protocol.cuh"

namespace commfuse::gpu {

constexpr int64_t kLineStride = 16;

__device__ __forceinline__ void put_line(char* line, uint2 pack, uint32_t flag) {
  const uint64_t high = static_cast<uint64_t>(flag) << 32;
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(line), "l"(high | pack.x),
               "l"(high | pack.y)
               : "memory");
}

// R13. Visible to whoever writes here next, since that peer has seen a later call of this rank, and
// the end of this kernel lies between (R14).
__device__ __forceinline__ void clear_line(char* line) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %1};" ::"l"(line), "l"(uint64_t{0})
               : "memory");
}

struct Line {
  uint64_t unit[2];

  __device__ __forceinline__ void load(const char* line) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(unit[0]), "=l"(unit[1])
                 : "l"(line)
                 : "memory");
  }
  __device__ __forceinline__ bool carries(uint32_t flag) const {
    return unit[0] >> 32 == flag && unit[1] >> 32 == flag;
  }
  __device__ __forceinline__ uint2 pack() const {
    return {static_cast<uint32_t>(unit[0]), static_cast<uint32_t>(unit[1])};
  }
};

// A single unit, for messages that are no whole packs: 6 bytes of data, and Exchange::short_flag()
// in the upper two.
constexpr int kUnitBits = 48;

__device__ __forceinline__ void put_unit(char* unit, uint64_t data, uint64_t flag) {
  store_relaxed(reinterpret_cast<uint64_t*>(unit), flag << kUnitBits | data);
}

// One thread: loads what lies at kCount addresses until all of it has come, and clears it.
template <int kCount, class Source, class Load, class Arrived, class Clear>
__device__ __forceinline__ bool take(const Exchange& exchange, int phase,
                                     char* const (&address)[kCount], Source source, Load load,
                                     Arrived arrived, Clear clear) {
  const auto all_there = [&] {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (address[i]) load(i);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) all &= !address[i] || arrived(i);
    return all;
  };
  const Wait outcome = exchange.poll(all_there);
  if (outcome != Wait::done) {
    if (outcome == Wait::timed_out) {
      int missing = -1;
#pragma unroll
      for (int i = kCount - 1; i >= 0; --i) {
        if (address[i] && !arrived(i)) missing = source(i);
      }
      exchange.time_out(missing, phase, 0);  // calls by lines have a word of block 0 only
    }
    return false;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (address[i]) clear(address[i]);
  }
  return true;
}

// One thread: waits for kCount lines at once and clears them. An address that is null stands for a
// line that is not wanted; lines[i] is then undefined. source(i) is who sends it. False: a failure.
template <int kCount, class Source>
__device__ __forceinline__ bool take_lines(const Exchange& exchange, int phase,
                                           char* const (&address)[kCount], Source source,
                                           Line (&lines)[kCount]) {
  const uint32_t flag = exchange.flag();
  return take(
      exchange, phase, address, source, [&](int i) { lines[i].load(address[i]); },
      [&](int i) { return lines[i].carries(flag); }, clear_line);
}

// Likewise single units.
template <int kCount, class Source>
__device__ __forceinline__ bool take_units(const Exchange& exchange, int phase,
                                           char* const (&address)[kCount], Source source,
                                           uint64_t (&data)[kCount]) {
  const uint64_t flag = exchange.short_flag();
  const bool taken = take(
      exchange, phase, address, source,
      [&](int i) { data[i] = load_relaxed(reinterpret_cast<const uint64_t*>(address[i])); },
      [&](int i) { return data[i] >> kUnitBits == flag; },
      [](char* unit) { store_relaxed(reinterpret_cast<uint64_t*>(unit), 0); });
#pragma unroll
  for (int i = 0; i < kCount; ++i) data[i] &= (uint64_t{1} << kUnitBits) - 1;
  return taken;
}

// One line of each of up to kWorld sources: line(s) is its address.
template <int kWorld, class Address>
__device__ __forceinline__ bool take_from_peers(const Exchange& exchange, int phase, Address line,
                                                Line (&lines)[kWorld]) {
  char* address[kWorld];
#pragma unroll
  for (int s = 0; s < kWorld; ++s) {
    address[s] = s < exchange.world() && s != exchange.rank() ? line(s) : nullptr;
  }
  return take_lines<kWorld>(exchange, phase, address, [](int s) { return s; }, lines);
}

// The sum in rank order of what the peers sent and this rank's own.
template <class T, int kWorld>
__device__ __forceinline__ Floats<T> sum_of(const Exchange& exchange, const Line (&lines)[kWorld],
                                            uint2 own) {
  const int rank = exchange.rank();
  Floats<T> sum(rank == 0 ? own : lines[0].pack());
#pragma unroll
  for (int s = 1; s < kWorld; ++s) {
    if (s < exchange.world()) sum.add(s == rank ? own : lines[s].pack());
  }
  return sum;
}

}  // namespace commfuse::gpu
