// What the launchers of ops on channels need of torch: dtypes and checks with messages.
#pragma once

#include "runtime/channel.h"
#include "runtime/tensors.h"

namespace commfuse {

inline at::ScalarType scalar_type(const Channel& channel) {
  switch (channel.shape().dtype) {
    case DType::bfloat16:
      return at::kBFloat16;
    case DType::float16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

inline void check_source(const Channel& channel, const char* op) {
  TORCH_CHECK_VALUE(channel.communicator().rank() == channel.source(), op, " is for rank ",
                    channel.source(), ", where this channel begins; this is rank ",
                    channel.communicator().rank());
}

inline void check_target(const Channel& channel, const char* op) {
  TORCH_CHECK_VALUE(channel.communicator().rank() == channel.target(), op, " is for rank ",
                    channel.target(), ", where this channel ends; this is rank ",
                    channel.communicator().rank());
}

inline void check_rows(const Channel& channel, int64_t rows) {
  TORCH_CHECK_VALUE(rows >= 0 && rows <= channel.shape().rows, "a message of ", rows,
                    " rows: the channel's slots take 0 to ", channel.shape().rows,
                    "; send more in several messages, or make the channel with more rows");
}

inline void check_message_type(const Channel& channel, int64_t columns, at::ScalarType dtype,
                               const char* name) {
  TORCH_CHECK_VALUE(columns == channel.shape().columns, name, " has ", columns,
                    " columns, the channel ", channel.shape().columns);
  TORCH_CHECK_VALUE(dtype == scalar_type(channel), name, " is ", dtype, ", the channel ",
                    scalar_type(channel));
}

inline void check_message(const Channel& channel, const at::Tensor& x, const char* name) {
  check_matrix(x, name);
  check_rows(channel, x.size(0));
  check_message_type(channel, x.size(1), x.scalar_type(), name);
}

}  // namespace commfuse
