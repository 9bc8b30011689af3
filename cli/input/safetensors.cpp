#include "input/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

namespace wh::cli {
namespace {

// Sorted members: ordered_json looks each one up by walking over all, minutes for a lying header.
using Json = nlohmann::json;

constexpr uint64_t kMostHeaderBytes = 100 << 20;  // the format's own limit
constexpr size_t kMostDims = 8;

struct ElementType {
  const char* name;
  int64_t bytes;
};
constexpr ElementType kElementTypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"U16", 2}, {"I16", 2}, {"F16", 2}, {"BF16", 2},
    {"U32", 4},  {"I32", 4}, {"F32", 4}, {"U64", 8}, {"I64", 8}, {"F64", 8}};

int64_t element_bytes(const std::string& dtype) {
  for (const ElementType& type : kElementTypes) {
    if (dtype == type.name) return type.bytes;
  }
  return 0;
}

// Nothing here may copy `entry` or a part of it: parsing and releasing take any depth of nesting on
// the heap, a copy takes it on the stack.
Result<StoredTensor> read_tensor(const std::string& name, const Json& entry,
                                 std::span<const std::byte> data) {
  const auto wrong = [&](const std::string& what) {
    return invalid(fmt::format("tensor \"{}\": {}", name, what));
  };
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string()) {
    return wrong("its entry has no dtype");
  }
  StoredTensor tensor;
  tensor.dtype = entry["dtype"].get<std::string>();
  const int64_t bytes_each = element_bytes(tensor.dtype);
  if (bytes_each == 0) return wrong(fmt::format("its dtype \"{}\" is unknown", tensor.dtype));
  if (!entry.contains("shape") || !entry["shape"].is_array() || entry["shape"].size() > kMostDims) {
    return wrong("its shape is not a list of at most 8 sizes");
  }
  int64_t bytes = bytes_each;
  for (const Json& size : entry["shape"]) {
    if (!size.is_number_unsigned() || !std::in_range<int64_t>(size.get<uint64_t>())) {
      return wrong("a size of its shape is not a number of elements");
    }
    tensor.shape.push_back(size.get<int64_t>());
    if (__builtin_mul_overflow(bytes, tensor.shape.back(), &bytes)) {
      return wrong("its shape overflows");
    }
  }
  const auto found = entry.find("data_offsets");
  if (found == entry.end()) return wrong("its entry has no data_offsets");
  const Json& offsets = *found;
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return wrong("its data_offsets are not two positions");
  }
  const auto begin = offsets[0].get<uint64_t>();
  const auto end = offsets[1].get<uint64_t>();
  if (begin > end || end > data.size()) {
    return wrong(fmt::format("its data_offsets {}..{} lie outside the {} bytes of data", begin, end,
                             data.size()));
  }
  if (end - begin != static_cast<uint64_t>(bytes)) {
    return wrong(
        fmt::format("its shape takes {} bytes, its data_offsets hold {}", bytes, end - begin));
  }
  tensor.bytes = data.subspan(begin, end - begin);
  return tensor;
}

Status check_overlaps(const SafetensorsView& view) {
  std::vector<std::pair<const std::byte*, const std::byte*>> ranges;
  for (const auto& [name, tensor] : view.tensors) {
    ranges.emplace_back(tensor.bytes.data(), tensor.bytes.data() + tensor.bytes.size());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return invalid("two tensors share data");
  }
  return {};
}

Status system_error(const char* action, const std::string& path) {
  return invalid(fmt::format("cannot {} {}: {}", action, path, std::strerror(errno)));
}

}  // namespace

Result<SafetensorsView> parse_safetensors(std::span<const std::byte> file) {
  uint64_t header_bytes = 0;
  if (file.size() < sizeof(header_bytes)) {
    return invalid(
        fmt::format("the file has {} bytes; a safetensors file has at least 8", file.size()));
  }
  std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
  const size_t rest = file.size() - sizeof(header_bytes);
  if (header_bytes > rest || header_bytes > kMostHeaderBytes) {
    return invalid(fmt::format(
        "the header claims {} bytes, the file has {} after its first 8; not a safetensors file, or "
        "cut off",
        header_bytes, rest));
  }
  const auto* text = reinterpret_cast<const char*>(file.data() + sizeof(header_bytes));
  const Json header = Json::parse(text, text + header_bytes, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return invalid("the header is not a JSON object");
  const std::span<const std::byte> data = file.subspan(sizeof(header_bytes) + header_bytes);
  SafetensorsView view;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return invalid("__metadata__ is not an object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) return invalid("__metadata__." + key + " is not a string");
        view.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    Result<StoredTensor> tensor = read_tensor(name, entry, data);
    if (!tensor.ok()) return tensor.status();
    view.tensors[name] = *tensor;
  }
  if (Status status = check_overlaps(view); !status.ok()) return status;
  return view;
}

Result<MappedFile> MappedFile::open(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return system_error("open", path);
  struct stat info {};
  if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(file);
    return invalid(fmt::format("cannot read {}: it is no regular file", path));
  }
  const auto size = static_cast<size_t>(info.st_size);
  void* data = size == 0 ? nullptr : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (data == MAP_FAILED) return system_error("map", path);
  return MappedFile(static_cast<const std::byte*>(data), size);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

Status write_safetensors(const std::string& path, const std::vector<TensorToStore>& tensors) {
  Json header = Json::object();
  uint64_t offset = 0;
  for (const TensorToStore& tensor : tensors) {
    header[tensor.name] = {{"dtype", tensor.dtype},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data starts aligned
  const uint64_t header_bytes = text.size();
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  file << text;
  for (const TensorToStore& tensor : tensors) {
    file.write(reinterpret_cast<const char*>(tensor.bytes.data()),
               static_cast<std::streamsize>(tensor.bytes.size()));
  }
  file.close();
  if (!file) return system_error("write", path);
  return {};
}

}  // namespace wh::cli
