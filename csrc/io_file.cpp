#include "io_file.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#ifdef __linux__
#include <linux/fs.h>
#include <sys/sysmacros.h>
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

namespace {

std::atomic<std::uint64_t> next_number{1};

// What a caller's descriptor says of the transfers by it.
constexpr int kKept = O_ACCMODE | O_SYNC | O_DSYNC;

// /dev/zero, /dev/full and their like, which take any offset and never keep a transfer waiting.
bool is_memory_device(const struct stat& status) {
#ifdef __linux__
  return S_ISCHR(status.st_mode) && major(status.st_rdev) == 1;
#else
  (void)status;
  return false;
#endif
}

// A transfer by anything without offsets (a pipe, a terminal, an eventfd) could wait for ever for somebody else. Looked
// at before it is opened, as to open a pipe may wait, too, and to open a terminal may change it.
void check_kind(const struct stat& status, const std::string& path) {
  if (S_ISREG(status.st_mode) || S_ISBLK(status.st_mode) || is_memory_device(status)) return;
  if (S_ISDIR(status.st_mode)) throw IoError(EISDIR, std::strerror(EISDIR), path);
  throw IoError(ESPIPE, std::string(std::strerror(ESPIPE)) + ": neither a regular file nor a block device", path);
}

// Opens what is open as `fd` once more: the very same file, whatever its name is by now.
int open_again(int fd, int flags) {
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  int again;
  do {
    again = ::open(path.c_str(), flags | O_CLOEXEC);
  } while (again < 0 && errno == EINTR);
  return again;
}

}  // namespace

std::shared_ptr<IoFile> IoFile::open(const std::string& path, int fd, Direction direction) {
  std::shared_ptr<IoFile> file(new IoFile);
  file->number_ = next_number++;
  if (!path.empty()) {
    file->path_ = path;
    struct stat status{};
    if (::stat(path.c_str(), &status) == 0) check_kind(status, path);
    file->access_ = direction == Direction::kRead ? O_RDONLY : O_WRONLY | O_CREAT;
    if (O_DIRECT != 0) file->direct_fd_ = file->open_by_path(O_DIRECT);
    // Names a missing file or a missing right, if it was not O_DIRECT that was refused.
    if (file->direct_fd_ < 0) {
      file->buffered_fd_ = file->open_by_path(0);
      if (file->buffered_fd_ < 0) throw IoError(errno, std::strerror(errno), path);
    }
  } else {
    file->path_ = "<fd " + std::to_string(fd) + ">";
    const int flags = ::fcntl(fd, F_GETFL);
    struct stat status{};
    if (flags < 0 || ::fstat(fd, &status) != 0) throw IoError(errno, std::strerror(errno), file->path_);
    check_kind(status, file->path_);
    file->access_ = flags & kKept;
    const bool wrong_way = (flags & O_ACCMODE) == (direction == Direction::kRead ? O_WRONLY : O_RDONLY);
    if (wrong_way) throw IoError(EBADF, "the descriptor is not open in this direction", file->path_);
    if (direction == Direction::kWrite && (flags & O_APPEND) != 0) {
      throw IoError(EINVAL, "the descriptor appends: the system would ignore the offset", file->path_);
    }
    // A copy now: the caller may close its descriptor while the operation runs.
    const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (copy < 0) throw IoError(errno, std::strerror(errno), file->path_);
    if (O_DIRECT != 0 && (flags & O_DIRECT) != 0) {
      file->direct_fd_ = copy;
    } else {
      file->buffered_fd_ = copy;
      if (O_DIRECT != 0) file->direct_fd_ = open_again(copy, file->access_ | O_DIRECT);
    }
  }
  file->identify();
  if (file->direct_fd_ >= 0) file->find_alignment();
  return file;
}

IoFile::~IoFile() {
  if (direct_fd_ >= 0) ::close(direct_fd_);
  if (buffered_fd_ >= 0) ::close(buffered_fd_);
}

bool IoFile::is_still(const std::string& path, int fd) const {
  struct stat status{};
  if (path.empty()) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0 || (flags & kKept) != access_ || (flags & O_APPEND) != 0) return false;
    if (::fstat(fd, &status) != 0) return false;
  } else if (::stat(path.c_str(), &status) != 0) {
    return false;
  }
  return identity_ == Identity{status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_gid};
}

int IoFile::open_by_path(int flags) const {
  int fd;
  do {
    fd = ::open(path_.c_str(), access_ | flags | O_CLOEXEC, 0666);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

int IoFile::buffered_fd() {
  if (buffered_fd_ < 0) {
    std::lock_guard lock(open_mutex_);
    if (buffered_fd_ < 0) {
      // Not by its path alone, which may name another file by now.
      int fd = open_again(direct_fd_, access_ & ~O_CREAT);
      if (fd < 0 && errno == ENOENT && is_still(path_, -1)) fd = open_by_path(0);  // no /proc here
      if (fd < 0) throw IoError(errno, std::string("opening it a second time: ") + std::strerror(errno), path_);
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

void IoFile::identify() {
  struct stat status{};
  if (::fstat(any_fd(), &status) != 0) throw IoError(errno, std::strerror(errno), path_);
  identity_ = {status.st_dev, status.st_ino, status.st_mode, status.st_uid, status.st_gid};
  device_ = S_ISBLK(status.st_mode) ? status.st_rdev : status.st_dev;
  check_kind(status, path_);
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

std::shared_ptr<IoFile> OpenFiles::open(const std::string& path, int fd, Direction direction) {
  const std::string name = path.empty() ? std::to_string(fd) : ":" + path;
  const std::string key = (direction == Direction::kRead ? "r" : "w") + name;
  std::shared_ptr<IoFile> file;
  {
    std::lock_guard lock(mutex_);
    const auto found = files_.find(key);
    if (found != files_.end()) file = found->second.lock();
  }
  // Not under the lock: a file system that is stuck must not hold up the others.
  if (file && file->is_still(path, fd)) return file;
  file = IoFile::open(path, fd, direction);
  std::lock_guard lock(mutex_);
  if (files_.size() >= purge_at_) {
    std::erase_if(files_, [](const auto& entry) { return entry.second.expired(); });
    purge_at_ = 2 * files_.size() + 64;
  }
  files_.insert_or_assign(key, file);
  return file;
}

std::uint64_t direct_io(const std::string& folder, std::string& why_not) {
  std::string path = folder + "/.offload_opt-XXXXXX";
  const int fd = ::mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) throw IoError(errno, std::strerror(errno), folder);
  ::close(fd);
  std::shared_ptr<IoFile> file;
  try {
    file = IoFile::open(path, -1, Direction::kWrite);
  } catch (const IoError&) {
    ::unlink(path.c_str());
    throw;
  }
  ::unlink(path.c_str());
  if (file->direct_fd() < 0) {
    why_not = "the file system does not open files with O_DIRECT";
    return 0;
  }
  const std::uint64_t granule = file->granule();
  const std::unique_ptr<void, void (*)(void*)> block(std::aligned_alloc(granule, granule), std::free);
  if (!block) throw IoError(ENOMEM, std::strerror(ENOMEM), folder);
  std::memset(block.get(), 0, granule);
  if (!file->direct_allowed(block.get(), 0)) {
    why_not = "the file system opens files with O_DIRECT, and then has no direct I/O for them";
  } else if (::pwrite(file->direct_fd(), block.get(), granule, 0) >= 0) {
    return granule;
  } else if (errno == ENOSPC) {
    throw IoError(ENOSPC, std::strerror(ENOSPC), folder);
  } else {
    why_not = std::string("writing with O_DIRECT: ") + std::strerror(errno);
  }
  return 0;
}

}  // namespace offload_opt
