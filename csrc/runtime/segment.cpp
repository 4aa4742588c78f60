#include "runtime/segment.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <new>
#include <stdexcept>
#include <system_error>

namespace commfuse {
namespace {

constexpr uint64_t kPage = 4096;
constexpr size_t kTokenBytes = 16;

uint64_t round_to_page(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::string random_hex() {
  unsigned char bytes[kTokenBytes];
  if (getrandom(bytes, sizeof bytes, 0) != static_cast<ssize_t>(sizeof bytes)) fail("getrandom");
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned char byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

// An abstract address begins with a zero byte: it lives in no file system and dies with its socket.
socklen_t abstract_address(const std::string& name, sockaddr_un* address) {
  *address = {};
  address->sun_family = AF_UNIX;
  if (name.size() + 1 > sizeof address->sun_path) throw std::invalid_argument("address too long");
  std::memcpy(address->sun_path + 1, name.data(), name.size());
  return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
}

// By then all ranks of a segment have met, or one of them cannot come.
class Deadline {
 public:
  Deadline() : end_(std::chrono::steady_clock::now() + std::chrono::seconds(10)) {}

  // Waits until fd is readable.
  void wait_readable(int fd, const std::string& what) const {
    for (;;) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
          end_ - std::chrono::steady_clock::now());
      if (left.count() <= 0) throw std::runtime_error("timed out " + what);
      pollfd poll_fd{fd, POLLIN, 0};
      const int ready = poll(&poll_fd, 1, static_cast<int>(left.count()));
      if (ready > 0) return;
      if (ready < 0 && errno != EINTR) fail("poll");
    }
  }

 private:
  std::chrono::steady_clock::time_point end_;
};

bool same_user(int socket_fd) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  return getsockopt(socket_fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length) == 0 &&
         credentials.uid == geteuid();
}

struct Hello {
  char token[2 * kTokenBytes];
  int32_t rank;
};

void send_memory(int socket_fd, int memory_fd, uint64_t bytes) {
  iovec data{&bytes, sizeof bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &memory_fd, sizeof(int));
  if (sendmsg(socket_fd, &message, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof bytes)) {
    fail("passing the shared memory to a rank");
  }
}

FileDescriptor receive_memory(int socket_fd, uint64_t* bytes) {
  iovec data{bytes, sizeof *bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (recvmsg(socket_fd, &message, MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(sizeof *bytes)) {
    throw std::runtime_error("rank 0 ended before it passed on the shared memory");
  }
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (!header || header->cmsg_type != SCM_RIGHTS) {
    throw std::runtime_error("rank 0 passed no shared memory");
  }
  int fd;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return FileDescriptor(fd);
}

// What this process may still allocate: the machine's free memory, and its control group's.
uint64_t available_memory() {
  uint64_t available = UINT64_MAX;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key, unit; meminfo >> key;) {
    uint64_t kilobytes = 0;
    meminfo >> kilobytes;
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") available = kilobytes * 1024;
  }
  uint64_t limit = 0, used = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit &&
      std::ifstream("/sys/fs/cgroup/memory.current") >> used) {
    available = std::min(available, limit > used ? limit - used : 0);
  }
  return available;
}

std::string mebibytes(uint64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

[[noreturn]] void too_little_memory(const SegmentSize& size, const std::string& why) {
  throw std::runtime_error(
      "too little shared memory: a " +
      (size.channel_bytes ? std::string("channel")
                          : "communicator of " + std::to_string(size.world) + " ranks") +
      " needs " + mebibytes(size.bytes()) + " (" + std::to_string(size.bytes()) + " bytes) and " +
      why + "; free that much, raise the limit, or pass " +
      (size.channel_bytes ? "fewer rows or slots" : "a smaller payload_bytes or workspace_bytes"));
}

}  // namespace

uint64_t SegmentSize::rank_bytes() const {
  // Phase 1 carries one rank's reduced slice, a W-th of phase 0.
  const uint64_t slice = round_to_page((payload_bytes + world - 1) / world);
  return round_to_page(sizeof(RankArea)) + 2 * (payload_bytes + slice) + workspace_bytes;
}

uint64_t SegmentSize::bytes() const {
  return round_to_page(sizeof(SegmentHeader)) + static_cast<uint64_t>(world) * rank_bytes() +
         channel_bytes;
}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = other.release();
  }
  return *this;
}

int FileDescriptor::release() {
  const int fd = fd_;
  fd_ = -1;
  return fd;
}

void FileDescriptor::reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

SegmentServer::SegmentServer(const SegmentSize& size) : size_(size) {
  if (size.world < 1 || size.world > kMaxWorld) {
    throw std::runtime_error("shared memory serves 1 to " + std::to_string(kMaxWorld) +
                             " ranks, not " + std::to_string(size.world));
  }
  size_.payload_bytes = round_to_page(size.payload_bytes);
  size_.workspace_bytes = round_to_page(size.workspace_bytes);
  size_.channel_bytes = round_to_page(size.channel_bytes);
  if (const uint64_t available = available_memory(); size_.bytes() > available) {
    too_little_memory(size_, "only " + mebibytes(available) + " are available");
  }
  memory_ = FileDescriptor(
      static_cast<int>(syscall(SYS_memfd_create, "commfuse", MFD_CLOEXEC | MFD_ALLOW_SEALING)));
  if (memory_.get() < 0) fail("memfd_create");
  // Reserved now, so that a rank never meets SIGBUS in the middle of a call. posix_fallocate
  // reports a limit on file sizes (ulimit -f) as EFBIG, after a SIGXFSZ that Python ignores.
  if (const int error = posix_fallocate(memory_.get(), 0, static_cast<off_t>(size_.bytes()))) {
    too_little_memory(size_, std::string("the system says: ") + std::strerror(error));
  }
  fcntl(memory_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);

  listener_ = FileDescriptor(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (listener_.get() < 0) fail("socket");
  const std::string name = "commfuse-" + random_hex();
  sockaddr_un address;
  const socklen_t length = abstract_address(name, &address);
  if (bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) fail("bind");
  if (listen(listener_.get(), kMaxWorld) != 0) fail("listen");
  token_ = random_hex();
  address_ = name + ":" + token_;
}

Segment::Segment(Segment&& other) noexcept
    : base_(other.base_),
      bytes_(other.bytes_),
      size_(other.size_),
      connections_(std::move(other.connections_)),
      peers_(std::move(other.peers_)) {
  other.base_ = nullptr;
}

Segment::~Segment() {
  if (base_) munmap(base_, bytes_);
}

void Segment::map(int memory_fd, uint64_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
  if (base == MAP_FAILED) {
    throw std::runtime_error(
        "too little address space: " + mebibytes(bytes) + " (" + std::to_string(bytes) +
        " bytes) of shared memory could not be mapped: " + std::strerror(errno));
  }
  base_ = static_cast<std::byte*>(base);
  bytes_ = bytes;
}

Segment Segment::serve(SegmentServer server) {
  Segment segment;
  segment.size_ = server.size_;
  segment.map(server.memory_.get(), server.size_.bytes());
  SegmentHeader& header = *new (segment.base_) SegmentHeader();
  header.bytes = server.size_.bytes();
  header.world = server.size_.world;
  header.payload_bytes = server.size_.payload_bytes;
  header.workspace_bytes = server.size_.workspace_bytes;
  header.channel_bytes = server.size_.channel_bytes;

  const Deadline deadline;
  std::vector<bool> seen(static_cast<size_t>(server.size_.world));
  while (static_cast<int>(segment.peers_.size()) < server.size_.world - 1) {
    deadline.wait_readable(server.listener_.get(), "waiting for all ranks to connect");
    FileDescriptor peer(accept4(server.listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (peer.get() < 0) fail("accept");
    if (!same_user(peer.get())) continue;
    Hello hello{};
    deadline.wait_readable(peer.get(), "waiting for a rank to say who it is");
    if (recv(peer.get(), &hello, sizeof hello, 0) != static_cast<ssize_t>(sizeof hello)) continue;
    if (std::memcmp(hello.token, server.token_.data(), sizeof hello.token) != 0) continue;
    if (hello.rank <= 0 || hello.rank >= server.size_.world || seen[hello.rank]) {
      throw std::runtime_error("two processes claim rank " + std::to_string(hello.rank));
    }
    seen[hello.rank] = true;
    send_memory(peer.get(), server.memory_.get(), server.size_.bytes());
    segment.connections_.push_back(std::move(peer));
    segment.peers_.push_back(hello.rank);
  }
  return segment;
}

Segment Segment::connect(const std::string& address, int rank) {
  const size_t colon = address.find(':');
  if (colon == std::string::npos || address.size() - colon - 1 != 2 * kTokenBytes) {
    throw std::invalid_argument("not a segment's address: " + address);
  }
  FileDescriptor server(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (server.get() < 0) fail("socket");
  sockaddr_un peer;
  const socklen_t length = abstract_address(address.substr(0, colon), &peer);
  if (::connect(server.get(), reinterpret_cast<sockaddr*>(&peer), length) != 0) {
    fail("connecting to rank 0");
  }
  if (!same_user(server.get())) throw std::runtime_error("rank 0 runs as another user");
  Hello hello{};
  std::memcpy(hello.token, address.data() + colon + 1, sizeof hello.token);
  hello.rank = rank;
  if (send(server.get(), &hello, sizeof hello, MSG_NOSIGNAL) !=
      static_cast<ssize_t>(sizeof hello)) {
    fail("greeting rank 0");
  }
  Deadline().wait_readable(server.get(), "waiting for rank 0's shared memory");
  uint64_t bytes = 0;
  const FileDescriptor memory = receive_memory(server.get(), &bytes);
  Segment segment;
  segment.map(memory.get(), bytes);
  segment.size_ = {segment.header().world, segment.header().payload_bytes,
                   segment.header().workspace_bytes, segment.header().channel_bytes};
  segment.connections_.push_back(std::move(server));
  segment.peers_.push_back(0);
  return segment;
}

RankArea& Segment::area(int rank) const {
  return *reinterpret_cast<RankArea*>(base_ + round_to_page(sizeof(SegmentHeader)) +
                                      static_cast<uint64_t>(rank) * size_.rank_bytes());
}

uint64_t Segment::payload_bytes(int phase) const {
  return phase == 0 ? size_.payload_bytes
                    : round_to_page((size_.payload_bytes + size_.world - 1) / size_.world);
}

std::byte* Segment::payload(int rank, int parity, int phase) const {
  std::byte* p = reinterpret_cast<std::byte*>(&area(rank)) + round_to_page(sizeof(RankArea));
  p += static_cast<uint64_t>(parity) * (payload_bytes(0) + payload_bytes(1));
  return phase == 0 ? p : p + payload_bytes(0);
}

std::byte* Segment::workspace(int rank) const { return payload(rank, 2, 0); }

std::byte* Segment::channel() const {
  return reinterpret_cast<std::byte*>(&area(size_.world - 1)) + size_.rank_bytes();
}

}  // namespace commfuse
