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
    case Op::send:
      return "send";
    case Op::recv:
      return "recv";
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

namespace {

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", seconds);
  return text;
}

// A channel's failure: its generation is the message's number.
std::string channel_failure(const FailureDetails& details, double seconds) {
  const auto& [failure, rank, peer, phase, block, message, seen, mine, theirs] = details;
  const std::string me = "rank " + std::to_string(rank), other = "rank " + std::to_string(peer);
  const std::string number = std::to_string(message);
  if (failure == Failure::mismatch) {
    return other + " called " + theirs.str() + " while " + me + " called " + mine.str() +
           " (message " + number +
           "): both ends of a channel must agree on the rows of every message";
  }
  if (failure == Failure::closed) {
    return other + " has closed its communicator while " + me + " was waiting for it in " +
           mine.str() + ", message " + number;
  }
  const std::string waited = me + " waited " + seconds_text(seconds) + " for " + other + " in " +
                             mine.str() + ", message " + number;
  if (mine.op == Op::send) {
    return waited +
           ": every slot holds a message that was not received, the last one received is " +
           std::to_string(seen) +
           ". Is that rank stuck, or did it leave out a recv? The limit is Communicator(timeout=)";
  }
  return waited + " (block " + std::to_string(block) + "): expected message " + number + ", seen " +
         std::to_string(seen) +
         ". Is that rank stuck, or did it leave out a send? The limit is Communicator(timeout=)";
}

}  // namespace

std::string ErrorRecord::str() const {
  const auto& [failure, rank, peer, phase, block, generation, seen, mine, theirs] = details;
  const std::string me = "rank " + std::to_string(rank), other = "rank " + std::to_string(peer);
  if (mine.op == Op::send || mine.op == Op::recv) return channel_failure(details, seconds);
  switch (failure) {
    case Failure::none:
      return "no error";
    case Failure::timeout:
      return me + " waited " + seconds_text(seconds) + " for " + other + " in " + mine.str() +
             ", call " + std::to_string(generation) + " (phase " + std::to_string(phase) +
             ", block " + std::to_string(block) + "): expected generation " +
             std::to_string(generation) + ", seen " + std::to_string(generation_of(seen)) +
             ". Is that rank stuck, or did it leave out a call? The limit is "
             "Communicator(timeout=)";
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
