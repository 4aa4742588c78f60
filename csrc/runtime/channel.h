// A channel from one rank of a communicator to another: slots of a fixed size in memory that the
// two share (docs/protocol.md, section 7). A message fills one slot, in blocks of rows that are
// published one by one, so that the receiver copies, or multiplies, one while the next is written.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "cpu/kernel_table.h"
#include "runtime/communicator.h"
#include "runtime/row_blocks.h"

namespace commfuse {

namespace gpu {
class ChannelEnd;
}

struct ChannelShape {
  DType dtype;
  int64_t rows;  // the most of a message
  int64_t columns;
  int slots;

  int64_t row_bytes() const { return columns * static_cast<int64_t>(size_of(dtype)); }
  uint64_t slot_bytes() const;
  uint64_t memory_bytes() const;  // between ranks on the CPU
};

// What an end calls in a message.
Descriptor describe_message(Op op, const ChannelShape& shape, int64_t rows);
// The digest in the words of both ends, whichever op exchanges the message.
uint16_t message_tag(const ChannelShape& shape, int64_t rows);

class Channel {
 public:
  // memory: of a segment of two, the source's end being rank 0.
  Channel(std::shared_ptr<Communicator> communicator, Segment memory, int source, int target,
          const ChannelShape& shape);
  // Between GPUs.
  Channel(std::shared_ptr<Communicator> communicator, std::shared_ptr<gpu::ChannelEnd> end,
          int source, int target, const ChannelShape& shape);
  ~Channel();
  Channel(const Channel&) = delete;

  const ChannelShape& shape() const { return shape_; }
  int source() const { return source_; }
  int target() const { return target_; }
  Communicator& communicator() const { return *communicator_; }
  int64_t handle() const { return handle_; }
  // Null between ranks on the CPU.
  gpu::ChannelEnd* gpu() const { return gpu_.get(); }

  static Channel& from_handle(int64_t handle);

 private:
  friend class Message;

  void enter_registry();

  std::shared_ptr<Communicator> communicator_;
  std::optional<Segment> memory_;  // none between GPUs
  std::shared_ptr<gpu::ChannelEnd> gpu_;
  int source_, target_;
  ChannelShape shape_;
  uint64_t messages_ = 0;  // that this end has begun
  std::atomic<bool> busy_{false};
  int64_t handle_;
};

// One message under way between ranks on the CPU, at either end. Throws at construction if the
// communicator has failed, is closed, or the channel is in use. A sender's construction waits for a
// free slot; a receiver's destruction frees the slot.
class Message {
 public:
  Message(Channel& channel, Op op, int64_t rows);
  ~Message();
  Message(const Message&) = delete;

  const RowBlocks& blocks() const { return blocks_; }
  std::byte* row(int64_t row) const { return slot_ + row * row_bytes_; }
  std::byte* block(int block) const { return row(blocks_.begin(block)); }
  size_t block_bytes(int block) const {
    return (blocks_.end(block) - blocks_.begin(block)) * row_bytes_;
  }
  // The sender's: what it has written to this block becomes visible to the receiver.
  void publish(int block);
  // The receiver's: returns when the block is there.
  void wait(int block);

 private:
  Word& word(int block) const;
  [[noreturn]] void fail(Failure failure, int block, uint64_t seen) const;

  Channel& channel_;
  Descriptor descriptor_;
  RowBlocks blocks_;
  int64_t row_bytes_;
  uint64_t number_ = 0;
  uint64_t word_ = 0;
  std::byte* slot_ = nullptr;
};

}  // namespace commfuse
