// A channel from one rank of a communicator to another: slots of a fixed size in memory that the
// two share (docs/protocol.md, section 7). A message fills one slot, in blocks of rows that are
// published one by one, so that the receiver copies, or multiplies, one while the next is written.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "cpu/kernel_table.h"
#include "runtime/communicator.h"

namespace commfuse {

struct ChannelShape {
  DType dtype;
  int64_t rows;  // the most of a message
  int64_t columns;
  int slots;

  int64_t row_bytes() const { return columns * static_cast<int64_t>(size_of(dtype)); }
  uint64_t slot_bytes() const;
  uint64_t memory_bytes() const;
};

// How the rows of a message are cut: a function of what both ends know before they exchange it.
struct RowBlocks {
  int64_t rows, rows_each;
  int count;  // one at least: a message without rows is one as well

  RowBlocks(int64_t rows, int64_t row_bytes);
  int64_t begin(int block) const { return std::min<int64_t>(rows, block * rows_each); }
  int64_t end(int block) const { return begin(block + 1); }
  // The end of the blocks that a GEMM computes together with this one: it reads its weights once
  // for all of them. Two ranks need not group alike.
  int group_end(int block) const {
    return std::min(count, block + static_cast<int>(std::max<int64_t>(1, kGroupRows / rows_each)));
  }

  // A multiple of the GEMM's tiles of six rows and of sixteen. With fewer rows, the reading of
  // large weights would take longer than their multiplication.
  static constexpr int64_t kGroupRows = 96;
};

class Channel {
 public:
  // memory: of a segment of two, the source's end being rank 0.
  Channel(std::shared_ptr<Communicator> communicator, Segment memory, int source, int target,
          const ChannelShape& shape);
  ~Channel();
  Channel(const Channel&) = delete;

  const ChannelShape& shape() const { return shape_; }
  int source() const { return source_; }
  int target() const { return target_; }
  Communicator& communicator() const { return *communicator_; }
  int64_t handle() const { return handle_; }

  static Channel& from_handle(int64_t handle);

 private:
  friend class Message;

  std::shared_ptr<Communicator> communicator_;
  Segment memory_;
  int source_, target_;
  ChannelShape shape_;
  uint64_t messages_ = 0;  // that this end has begun
  std::atomic<bool> busy_{false};
  int64_t handle_;
};

// One message under way, at either end. Throws at construction if the communicator has failed, is
// closed, or the channel is in use. A sender's construction waits for a free slot; a receiver's
// destruction frees the slot.
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
