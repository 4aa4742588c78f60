#include "runtime/channel.h"

#include <unistd.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace commfuse {
namespace {

constexpr uint64_t kSlotAlignment = 4096;

uint64_t align(uint64_t bytes) {
  return (bytes + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
}

// What the two ends share, followed by the slots. Only the target writes `consumed`; the source
// writes everything else.
struct Head {
  alignas(kLine) std::atomic<uint64_t> consumed;
};
struct SlotHead {
  Word words[kMaxBlocks];
  Descriptor descriptor;
};

Head& head_of(const Segment& memory) { return *reinterpret_cast<Head*>(memory.channel()); }
SlotHead& slot_head(const Segment& memory, int slot) {
  return reinterpret_cast<SlotHead*>(memory.channel() + sizeof(Head))[slot];
}
uint64_t heads_bytes(int slots) {
  return align(sizeof(Head) + static_cast<uint64_t>(slots) * sizeof(SlotHead));
}

// Handles are never used again, so that a stale one cannot reach a newer channel.
std::mutex registry_mutex;
std::vector<Channel*> registry;

}  // namespace

Descriptor describe_message(Op op, const ChannelShape& shape, int64_t rows) {
  Descriptor descriptor;
  descriptor.op = op;
  descriptor.dtype = shape.dtype;
  descriptor.dims = 2;
  descriptor.shape[0] = rows;
  descriptor.shape[1] = shape.columns;
  return descriptor;
}

uint16_t message_tag(const ChannelShape& shape, int64_t rows) {
  return describe_message(Op::send, shape, rows).tag();
}

uint64_t ChannelShape::slot_bytes() const {
  return align(static_cast<uint64_t>(rows * row_bytes()));
}

uint64_t ChannelShape::memory_bytes() const {
  return heads_bytes(slots) + static_cast<uint64_t>(slots) * slot_bytes();
}

Channel::Channel(std::shared_ptr<Communicator> communicator, Segment memory, int source, int target,
                 const ChannelShape& shape)
    : communicator_(std::move(communicator)),
      memory_(std::move(memory)),
      source_(source),
      target_(target),
      shape_(shape) {
  enter_registry();
}

Channel::Channel(std::shared_ptr<Communicator> communicator, std::shared_ptr<gpu::ChannelEnd> end,
                 int source, int target, const ChannelShape& shape)
    : communicator_(std::move(communicator)),
      gpu_(std::move(end)),
      source_(source),
      target_(target),
      shape_(shape) {
  enter_registry();
}

void Channel::enter_registry() {
  const std::lock_guard lock(registry_mutex);
  handle_ = static_cast<int64_t>(registry.size());
  registry.push_back(this);
}

Channel::~Channel() {
  const std::lock_guard lock(registry_mutex);
  registry[handle_] = nullptr;
}

Channel& Channel::from_handle(int64_t handle) {
  const std::lock_guard lock(registry_mutex);
  if (handle < 0 || handle >= static_cast<int64_t>(registry.size()) || !registry[handle]) {
    throw CommunicatorError(Failure::closed, "no channel has the handle " + std::to_string(handle) +
                                                 ": it was closed, or never made");
  }
  return *registry[handle];
}

Message::Message(Channel& channel, Op op, int64_t rows)
    : channel_(channel),
      descriptor_(describe_message(op, channel.shape_, rows)),
      blocks_(rows, channel.shape_.row_bytes(), kMaxBlocks),
      row_bytes_(channel.shape_.row_bytes()) {
  if (!channel.memory_) {
    throw std::invalid_argument("the channel is between GPUs, the tensors are on the CPU");
  }
  if (channel.busy_.exchange(true, std::memory_order_acquire)) {
    throw ConcurrentUseError("a second stream of calls on one channel: " + descriptor_.str() +
                             " began while another thread's call was running");
  }
  Communicator& communicator = *channel.communicator_;
  try {
    communicator.check();
    number_ = channel.messages_ + 1;
    word_ = word_value(number_, message_tag(channel.shape_, rows));
    const int slot = static_cast<int>(number_ % channel.shape_.slots);
    slot_ = channel.memory_->channel() + heads_bytes(channel.shape_.slots) +
            static_cast<uint64_t>(slot) * channel.shape_.slot_bytes();
    if (op == Op::send) {
      const uint64_t slots = static_cast<uint64_t>(channel.shape_.slots);
      const uint64_t free_from = number_ > slots ? number_ - slots : 0;
      const std::atomic<uint64_t>& consumed = head_of(*channel.memory_).consumed;
      communicator.wait_for(
          channel.target_,
          // Acquire: the receiver's last load of this slot lies before its release store.
          [&] { return consumed.load(std::memory_order_acquire) >= free_from; },
          [] { return false; },
          [&](Failure failure) { fail(failure, 0, consumed.load(std::memory_order_relaxed)); });
      slot_head(*channel.memory_, slot).descriptor = descriptor_;
    }
  } catch (...) {
    channel.busy_.store(false, std::memory_order_release);
    throw;
  }
  channel.messages_ = number_;
  ++communicator.statistics_.calls;
}

Message::~Message() {
  if (descriptor_.op != Op::send) {
    // Release: the loads of this slot lie before it. Where a wait has failed, it frees a slot of a
    // communicator that nobody can use any more.
    head_of(*channel_.memory_).consumed.store(number_, std::memory_order_release);
  }
  channel_.busy_.store(false, std::memory_order_release);
}

Word& Message::word(int block) const {
  const int slot = static_cast<int>(number_ % channel_.shape_.slots);
  return slot_head(*channel_.memory_, slot).words[block];
}

void Message::fail(Failure failure, int block, uint64_t seen) const {
  Communicator& communicator = *channel_.communicator_;
  const int slot = static_cast<int>(number_ % channel_.shape_.slots);
  communicator.raise({failure, communicator.rank(),
                      communicator.rank() == channel_.source_ ? channel_.target_ : channel_.source_,
                      0, block, number_, seen, descriptor_,
                      slot_head(*channel_.memory_, slot).descriptor});
}

void Message::publish(int block) {
  Communicator& communicator = *channel_.communicator_;
  if (communicator.publish_delay_us_) {
    usleep(static_cast<useconds_t>(communicator.publish_delay_us_));
  }
  const size_t bytes = block_bytes(block);
  communicator.statistics_.bytes_sent += bytes;
  Word& signal = word(block);
  if (communicator.link_) {
    signal.deliver_at = communicator.egress_.deliver_at(now_ns(), static_cast<double>(bytes));
  }
  // Release: the block's rows and the message's descriptor, written before, become visible to the
  // receiver that sees the word.
  signal.value.store(word_, std::memory_order_release);
}

void Message::wait(int block) {
  const Word& signal = word(block);
  channel_.communicator_->wait_for(
      channel_.source_,
      // Acquire: what the sender wrote before its release store of this word is now visible.
      [&] { return signal.value.load(std::memory_order_acquire) == word_; },
      [&] {
        const uint64_t seen = signal.value.load(std::memory_order_acquire);
        return seen != word_ && generation_of(seen) == number_;
      },
      [&](Failure failure) {
        // The last message that has begun to arrive may stand in another slot.
        uint64_t seen = 0;
        for (int slot = 0; slot < channel_.shape_.slots; ++slot) {
          const Word& first = slot_head(*channel_.memory_, slot).words[0];
          seen = std::max(seen, generation_of(first.value.load(std::memory_order_relaxed)));
        }
        fail(failure, block, seen);
      });
  if (channel_.communicator_->link_) hold_until(signal.deliver_at);
}

}  // namespace commfuse
