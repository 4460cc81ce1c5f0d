// What the native tests share.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "aio_handle.h"

namespace offload_opt {

namespace fs = std::filesystem;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

#define CHECK(condition)                                                                                       \
  do {                                                                                                         \
    if (!(condition)) throw Failure(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " #condition); \
  } while (false)

using Bytes = std::vector<char>;

inline Bytes random_bytes(std::mt19937_64& random, std::size_t size) {
  Bytes bytes;
  bytes.reserve(size + 1);  // data() is then never null, which memcpy() asks for
  bytes.resize(size);
  for (auto& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

inline TransferSpec spec(Direction direction, void* data, std::uint64_t length, std::uint64_t offset,
                         const fs::path& path) {
  TransferSpec result{};
  result.direction = direction;
  result.data = data;
  result.length = length;
  result.offset = offset;
  result.path = path.string();
  return result;
}

inline std::uint64_t finish(AioHandle& handle, const OperationPtr& operation) {
  while (!handle.wait_for(*operation, std::chrono::milliseconds(1000))) {
  }
  return handle.result(*operation);
}

// The errno that `call` throws as an IoError; 0 where it throws nothing.
template <typename Call>
int error_of(Call call) {
  try {
    call();
  } catch (const IoError& error) {
    return error.error;
  }
  return 0;
}

// The engines that work here.
inline std::vector<const EngineEntry*> working_engines() {
  std::vector<const EngineEntry*> engines;
  for (const EngineEntry* engine : engine_table()) {
    std::string why_not;
    if (engine->available(why_not)) engines.push_back(engine);
  }
  return engines;
}

// Throws a Failure.
void check_adam(std::uint64_t seed);
void check_codecs(std::uint64_t seed);
void check_leaf_hashes(std::uint64_t seed);

using Folders = std::vector<fs::path>;

// Runs the seeded fault plans first .. first + count - 1 with files in `folders`, most of them in the first. Prints the
// seed of one that fails, or that hangs, and `command`, which repeats it when the seed and 1 are put behind it. Returns
// whether all held.
bool run_plans(const Folders& folders, std::uint64_t first, std::uint64_t count, const std::string& command);

}  // namespace offload_opt
