// The CPU's kernels, and host memory.
#include <cstring>
#include <new>

#include "cpu/cpu_facts.h"
#include "support/kernels_under_test.h"

namespace wh {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

std::vector<const char*> kernels_under_test() {
  return {"cpu_prefill", "cpu_prefill_bf16", "cpu_decode", "cpu_unfused", "cpu_reference"};
}

std::string why_not_here(const std::string& kernel) {
  if (kernel != "cpu_prefill_bf16" || cpu_facts().has_avx512_bf16) return "";
  return "this CPU has no AVX512-BF16";
}

// From the heap, at their size: a sanitizer sees what reads past them.
Placed::Placed(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  data_ = ::operator new(bytes, kAlignment);
  std::memset(data_, 0xff, bytes);
}
Placed::Placed(const std::vector<std::byte>& bytes) : Placed(bytes.size()) {
  if (size_ > 0) std::memcpy(data_, bytes.data(), size_);
}
Placed::~Placed() { ::operator delete(data_, kAlignment); }

std::vector<std::byte> Placed::fetch() const {
  const auto* from = static_cast<const std::byte*>(data_);
  return {from, from + size_};
}

}  // namespace wh
