#include "runtime/protocol.h"

#include <cstdio>

namespace commfuse {

const char* name_of(Op op) {
  switch (op) {
    case Op::none:
      return "nothing";
    case Op::barrier:
      return "barrier";
    case Op::all_reduce:
      return "all_reduce";
    case Op::all_reduce_rms_norm:
      return "all_reduce_rms_norm";
    case Op::matmul_all_reduce:
      return "matmul_all_reduce";
    case Op::vocab_parallel_argmax:
      return "vocab_parallel_argmax";
    case Op::verify_chain:
      return "verify_chain";
    case Op::reduce_scatter:
      return "reduce_scatter";
    case Op::all_gather:
      return "all_gather";
    case Op::vocab_parallel_sample:
      return "vocab_parallel_sample";
    case Op::hand_over:
      return "hand_over";
  }
  return "unknown";
}

uint16_t Descriptor::tag() const {
  // FNV-1a over the fields, with the multiplication's high bits folded in.
  uint64_t hash = 0xcbf29ce484222325u;
  auto mix = [&](uint64_t value) {
    hash = (hash ^ value) * 0x100000001b3u;
    hash ^= hash >> 29;
  };
  mix(static_cast<uint64_t>(op) << 40 | static_cast<uint64_t>(dtype) << 32 | variant);
  mix(dims);
  for (int i = 0; i < dims; ++i) mix(static_cast<uint64_t>(shape[i]));
  const uint16_t tag = static_cast<uint16_t>(hash ^ hash >> 16 ^ hash >> 32 ^ hash >> 48);
  return tag ? tag : 1;
}

std::string Descriptor::str() const {
  static constexpr const char* kNames[] = {"bfloat16", "float16", "float32"};
  std::string text = name_of(op);
  if (op == Op::none || op == Op::barrier) return text;
  if (op == Op::hand_over) return text + " of " + std::to_string(shape[0]) + " bytes";
  text += std::string(" ") + kNames[static_cast<int>(dtype)] + "[";
  for (int i = 0; i < dims; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  text += "]";
  if (variant) text += " (variant " + std::to_string(variant) + ")";
  return text;
}

std::string ErrorRecord::str() const {
  const auto& [failure, rank, peer, phase, block, generation, seen, mine, theirs] = details;
  const std::string me = "rank " + std::to_string(rank), other = "rank " + std::to_string(peer);
  switch (failure) {
    case Failure::none:
      return "no error";
    case Failure::timeout: {
      char waited[32];
      std::snprintf(waited, sizeof waited, "%.3g", seconds);
      return me + " waited " + waited + " s for " + other + " in " + mine.str() + ", call " +
             std::to_string(generation) + " (phase " + std::to_string(phase) + ", block " +
             std::to_string(block) + "): expected generation " + std::to_string(generation) +
             ", seen " + std::to_string(generation_of(seen)) +
             ". Is that rank stuck, or did it leave out a call? The limit is "
             "Communicator(timeout=)";
    }
    case Failure::mismatch:
      return other + " called " + theirs.str() + " while " + me + " called " + mine.str() +
             " (call " + std::to_string(generation) +
             "): all ranks must make the same calls in the same order";
    case Failure::died:
      return other + " is gone: its process ended without closing the communicator (noticed by " +
             me + ")";
    case Failure::closed:
      return other + " has closed its communicator while " + me + " was waiting for it in " +
             mine.str() + ", call " + std::to_string(generation);
  }
  return "unknown error";
}

}  // namespace commfuse
