// The exchange of a few scalars per row.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/communicator.h"

namespace commfuse {

// values[i] = every rank's values[i], combined in rank order: combine(into, from). As many calls as
// the payload asks for; one at least.
template <class T, class Combine>
void exchange_rows(Communicator& communicator, const Descriptor& descriptor, std::vector<T>& values,
                   Combine combine) {
  const CommunicationTimer timer(communicator);
  const int world = communicator.world(), rank = communicator.rank();
  if (world == 1) {
    const Call call(communicator, descriptor);
    return;
  }
  const size_t capacity = communicator.payload_bytes(0) / sizeof(T);
  size_t done = 0;
  do {
    Call call(communicator, descriptor);
    const size_t count = std::min(capacity, values.size() - done);
    if (count) std::memcpy(call.payload(rank, 0), values.data() + done, count * sizeof(T));
    call.publish(0, 0, count * sizeof(T));
    call.wait_all(0, 0);
    // This rank's own come from its payload, in their turn: the order is the same on all ranks.
    for (int r = 0; r < world; ++r) {
      const T* theirs = reinterpret_cast<const T*>(call.payload(r, 0));
      if (r == 0) {
        std::copy(theirs, theirs + count, values.data() + done);
      } else {
        for (size_t i = 0; i < count; ++i) combine(values[done + i], theirs[i]);
      }
    }
    done += count;
  } while (done < values.size());
}

}  // namespace commfuse
