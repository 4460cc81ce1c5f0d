#include "io_file.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#ifdef __linux__
#include <linux/fs.h>
#endif

#ifndef O_DIRECT
#define O_DIRECT 0  // macOS: everything goes through the page cache
#endif

namespace offload_opt {

IoError::IoError(int error_number, const std::string& message, std::string file)
    : std::runtime_error(message), error(error_number), path(std::move(file)) {}

std::uint64_t page_size() {
  static const auto size = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

std::shared_ptr<IoFile> IoFile::open(const std::string& path, int fd, Direction direction) {
  std::shared_ptr<IoFile> file(new IoFile);
  if (!path.empty()) {
    file->path_ = file->reopen_path_ = path;
    file->access_ = direction == Direction::kRead ? O_RDONLY : O_WRONLY | O_CREAT;
  } else {
    file->path_ = "<fd " + std::to_string(fd) + ">";
    file->reopen_path_ = "/proc/self/fd/" + std::to_string(fd);
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0) throw IoError(errno, std::strerror(errno), file->path_);
    file->access_ = flags & O_ACCMODE;
    const bool wrong_way = file->access_ == (direction == Direction::kRead ? O_WRONLY : O_RDONLY);
    if (wrong_way) throw IoError(EBADF, "the descriptor is not open in this direction", file->path_);
    if (direction == Direction::kWrite && (flags & O_APPEND) != 0) {
      throw IoError(EINVAL, "the descriptor appends: the system would ignore the offset", file->path_);
    }
    // A copy now: the caller may close its descriptor while the operation runs.
    const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (copy < 0) throw IoError(errno, std::strerror(errno), file->path_);
    file->reopen_path_ = "/proc/self/fd/" + std::to_string(copy);
    if (O_DIRECT != 0 && (flags & O_DIRECT) != 0) {
      file->direct_fd_ = copy;
    } else {
      file->buffered_fd_ = copy;
    }
  }
  if (O_DIRECT != 0 && file->direct_fd_ < 0) file->direct_fd_ = file->reopen(O_DIRECT);
  if (file->direct_fd_ < 0) {
    file->buffered_fd();  // names a missing file or a missing right, if it was not O_DIRECT that was refused
  } else {
    file->find_alignment();
  }
  file->check_has_offsets();
  return file;
}

IoFile::~IoFile() {
  if (direct_fd_ >= 0) ::close(direct_fd_);
  if (buffered_fd_ >= 0) ::close(buffered_fd_);
}

int IoFile::reopen(int flags) const {
  int fd;
  do {
    fd = ::open(reopen_path_.c_str(), access_ | flags | O_CLOEXEC, 0666);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

int IoFile::buffered_fd() {
  if (buffered_fd_ < 0) {
    std::lock_guard lock(open_mutex_);
    if (buffered_fd_ < 0) {
      const int fd = reopen(0);
      if (fd < 0) throw IoError(errno, std::strerror(errno), path_);
      buffered_fd_ = fd;
    }
  }
  return buffered_fd_;
}

void IoFile::find_alignment() {
  std::uint64_t offset_alignment = 512;
  struct stat status{};
  if (::fstat(direct_fd_, &status) != 0) throw IoError(errno, std::strerror(errno), path_);
  memory_alignment_ = page_size();
#ifdef STATX_DIOALIGN
  struct statx extended{};
  if (::statx(direct_fd_, "", AT_EMPTY_PATH, STATX_DIOALIGN, &extended) == 0 &&
      (extended.stx_mask & STATX_DIOALIGN) != 0) {
    if (extended.stx_dio_offset_align == 0 || extended.stx_dio_mem_align == 0) {
      direct_forbidden_ = true;  // the file system opens with O_DIRECT but has none for this file
    } else {
      offset_alignment = extended.stx_dio_offset_align;
      memory_alignment_ = extended.stx_dio_mem_align;
    }
  }
#endif
  // Blocks beyond 64 KiB are a hint about transfer sizes (network file systems), not a unit of caching.
  const auto block = std::min<std::uint64_t>(std::bit_floor(static_cast<std::uint64_t>(status.st_blksize)), 64 * 1024);
  granule_ = std::max({offset_alignment, page_size(), block});
}

int IoFile::any_fd() const { return direct_fd_ >= 0 ? direct_fd_ : buffered_fd_.load(); }

void IoFile::check_has_offsets() const {
  struct stat status{};
  if (::fstat(any_fd(), &status) != 0) throw IoError(errno, std::strerror(errno), path_);
  if (S_ISDIR(status.st_mode)) throw IoError(EISDIR, std::strerror(EISDIR), path_);
  if (S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode)) throw IoError(ESPIPE, std::strerror(ESPIPE), path_);
}

std::uint64_t IoFile::size() const {
  const int fd = any_fd();
  struct stat status{};
  if (::fstat(fd, &status) != 0) throw IoError(errno, std::strerror(errno), path_);
  if (S_ISREG(status.st_mode)) return static_cast<std::uint64_t>(status.st_size);
#ifdef BLKGETSIZE64
  std::uint64_t bytes = 0;
  if (S_ISBLK(status.st_mode) && ::ioctl(fd, BLKGETSIZE64, &bytes) == 0) return bytes;
#endif
  return UINT64_MAX;
}

}  // namespace offload_opt
