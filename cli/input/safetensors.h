// Reads safetensors files: an 8-byte little-endian header length, a JSON header that places each
// tensor, then the data. Format: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"

namespace wh::cli {

struct StoredTensor {
  std::string dtype;  // as stored: "F16", "BF16", "F32", "I32", "U8", "BOOL", ...
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

struct SafetensorsView {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Views into `file`. Trusts nothing: lengths, offsets, shapes and overlaps are checked, so that any
// bytes at all are either a valid view or an error.
Result<SafetensorsView> parse_safetensors(std::span<const std::byte> file);

// A file mapped into memory for as long as this lives.
class MappedFile {
 public:
  MappedFile() = default;  // no file
  static Result<MappedFile> open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

struct TensorToStore {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

Status write_safetensors(const std::string& path, const std::vector<TensorToStore>& tensors);

}  // namespace wh::cli
