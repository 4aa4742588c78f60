// Memory shared by the ranks of one host, with no name in any file system: a memfd made by rank 0,
// whose descriptor travels by SCM_RIGHTS over a private Unix socket (abstract address, same user
// only, secret token).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/protocol.h"

namespace commfuse {

struct SegmentSize {
  int world;
  uint64_t payload_bytes;
  uint64_t workspace_bytes;
  uint64_t channel_bytes = 0;  // of all ranks together, for a channel between two of them

  uint64_t rank_bytes() const;  // of one rank: words, descriptors, payload halves, workspace
  uint64_t bytes() const;
};

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor() { reset(); }
  int get() const { return fd_; }
  int release();
  void reset();

 private:
  int fd_ = -1;
};

// Rank 0's end of the rendezvous. Its address is handed to the other ranks by any means.
class SegmentServer {
 public:
  // Throws std::system_error or std::runtime_error; the latter says how many bytes are needed
  // where they are not to be had.
  explicit SegmentServer(const SegmentSize& size);
  const std::string& address() const { return address_; }

 private:
  friend class Segment;
  SegmentSize size_;
  FileDescriptor memory_;
  FileDescriptor listener_;
  std::string address_;
  std::string token_;
};

class Segment {
 public:
  // Rank 0: waits until all others have connected; they begin together, so that it takes no more
  // than some seconds.
  static Segment serve(SegmentServer server);
  // The others.
  static Segment connect(const std::string& address, int rank);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  ~Segment();

  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(base_); }
  RankArea& area(int rank) const;
  std::byte* payload(int rank, int parity, int phase) const;
  std::byte* workspace(int rank) const;
  std::byte* channel() const;
  uint64_t payload_bytes(int phase) const;
  std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }

  // A connection that is open as long as its peer lives: to every rank on rank 0, to rank 0
  // elsewhere. peer_of(i) names the rank at its other end.
  const std::vector<FileDescriptor>& connections() const { return connections_; }
  const std::vector<int>& peers() const { return peers_; }

 private:
  Segment() = default;
  void map(int memory_fd, uint64_t bytes);

  std::byte* base_ = nullptr;
  uint64_t bytes_ = 0;
  SegmentSize size_{};
  std::vector<FileDescriptor> connections_;
  std::vector<int> peers_;
};

}  // namespace commfuse
