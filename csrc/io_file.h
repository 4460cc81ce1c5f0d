// An open file as an operation sees it: one descriptor past the page cache, one through it, and the alignment between
// them.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>

#include "io_engine.h"

namespace offload_opt {

// The one kind of error that the core raises for I/O. It becomes OSError(error, message, path) in Python.
struct IoError : std::runtime_error {
  IoError(int error, const std::string& message, std::string path);
  int error;  // an errno
  std::string path;
};

class IoFile {
 public:
  // Opens `path`, or another description of the open file `fd` when `path` is empty. The caller's `fd` is not kept: it
  // may be closed at once. A file to be written is created where it is missing. Throws IoError; for what has no
  // offsets (a pipe, a terminal, an eventfd) before it is opened, with ESPIPE.
  static std::shared_ptr<IoFile> open(const std::string& path, int fd, Direction direction);
  ~IoFile();
  IoFile(const IoFile&) = delete;
  IoFile& operator=(const IoFile&) = delete;

  // Whether `path` or `fd`, as given to open(), still names this open file with the same rights.
  bool is_still(const std::string& path, int fd) const;

  // The number of the device that the file lies on.
  dev_t device() const { return device_; }
  // A number that no other open file of this process has or will have, for either of the two descriptors.
  std::uint64_t id(bool direct) const { return 2 * number_ + (direct ? 1 : 0); }

  // The descriptor with O_DIRECT, or -1 where the file system has none.
  int direct_fd() const { return direct_fd_; }
  // The descriptor through the page cache; opened when first asked for. Throws IoError. Any thread.
  int buffered_fd();
  // Gives direct I/O up for this file: it was refused although it could be opened.
  void forbid_direct() { direct_forbidden_ = true; }

  // Whether what begins at `data` may go to `offset` past the page cache, as far as it is whole granules. Regions that
  // go direct and regions that go through the page cache never share a page or a block: a dirty page would overwrite
  // what direct I/O wrote beside it.
  bool direct_allowed(const void* data, std::uint64_t offset) const {
    return direct_fd_ >= 0 && !direct_forbidden_ && offset % granule_ == 0 &&
           reinterpret_cast<std::uintptr_t>(data) % memory_alignment_ == 0;
  }
  std::uint64_t granule() const { return granule_; }

  // Bytes in the file now; UINT64_MAX where the question makes no sense (a character device). Throws IoError.
  std::uint64_t size() const;
  const std::string& path() const { return path_; }

 private:
  IoFile() = default;
  // Device, inode, mode, owner and group: while the file is held open, nothing else has its device and inode.
  using Identity = std::tuple<dev_t, ino_t, mode_t, uid_t, gid_t>;

  int open_by_path(int flags) const;
  void find_alignment();
  int any_fd() const;
  void identify();  // throws for a folder, and for what has no offsets

  std::string path_;  // for messages; "<fd 7>" for a descriptor
  // O_RDONLY, O_WRONLY or O_RDWR; with it O_CREAT for a path to write, or the O_SYNC or O_DSYNC of a descriptor.
  int access_ = 0;
  std::uint64_t number_ = 0;
  Identity identity_{};
  dev_t device_ = 0;
  int direct_fd_ = -1;
  std::atomic<int> buffered_fd_{-1};
  std::mutex open_mutex_;  // only one thread opens buffered_fd_
  std::atomic<bool> direct_forbidden_{false};
  std::uint64_t granule_ = 4096;
  std::uint64_t memory_alignment_ = 4096;
};

// Shares open files between the operations that are pending on them at the same time: many small transfers of one file
// open it once. Nothing is kept open for later. Any thread.
class OpenFiles {
 public:
  // As IoFile::open().
  std::shared_ptr<IoFile> open(const std::string& path, int fd, Direction direction);

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::weak_ptr<IoFile>> files_;
  std::size_t purge_at_ = 64;
};

// Whether files in `folder` can be written past the page cache, by trying it on a temporary file: the
// granule in bytes, or 0 and the reason why not. Throws IoError where no file can be made there.
std::uint64_t direct_io(const std::string& folder, std::string& why_not);

// The granule of direct I/O that holds on ordinary file systems: the page size.
std::uint64_t page_size();

}  // namespace offload_opt
