// libFuzzer: any bytes as the struct of a merge and of its parts. Nothing may crash, and a merge
// that succeeds must have stayed inside its tensors (AddressSanitizer watches).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/layout_checks.h"
#include "widehead/widehead.h"

namespace {

constexpr int kMostParts = 3;
constexpr int64_t kMostElements = 1 << 16;

// Memory for a tensor of any strides, in f32's size; nothing where that would be too much.
std::vector<float> memory(const wh_merged& m, const wh::Strides& strides, int64_t dim) {
  for (const int64_t stride : strides) {
    if (stride < 0 || stride > kMostElements) return {};
  }
  const int64_t span = wh::span_elements({m.batch, m.heads_q, m.len_q, dim}, strides);
  return std::vector<float>(span > kMostElements ? 0 : static_cast<size_t>(span), 0.5f);
}

template <size_t kCount>
wh::Strides strides_of(const int64_t (&from)[kCount]) {
  wh::Strides strides{0, 0, 0, 1};
  std::copy(std::begin(from), std::end(from), strides.begin());
  return strides;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  wh_merged merged;
  if (wh_merged_init(&merged, sizeof(merged)) != WH_OK) __builtin_trap();
  wh_partial parts[kMostParts]{};
  const size_t first = std::min(size, sizeof(merged));
  std::memcpy(&merged, data, first);
  std::memcpy(parts, data + first, std::min(size - first, sizeof(parts)));
  const size_t count = (size - first) / sizeof(wh_partial) % (kMostParts + 1);
  // A size beyond the struct, and a pointer made of fuzz, are the caller's fault.
  merged.size = std::min(merged.size, sizeof(merged));
  const bool is_small = merged.batch >= 0 && merged.batch <= 64 && merged.heads_q >= 0 &&
                        merged.heads_q <= 64 && merged.len_q >= 0 && merged.len_q <= 64 &&
                        merged.batch * merged.heads_q * merged.len_q <= 4096 && merged.dim_v > 0 &&
                        merged.dim_v <= 2048;
  std::vector<std::vector<float>> tensors;
  const auto place = [&](const auto& strides, int64_t dim) -> float* {
    if (!is_small) return nullptr;
    tensors.push_back(memory(merged, strides_of(strides), dim));
    return tensors.back().empty() ? nullptr : tensors.back().data();
  };
  merged.out = place(merged.stride_out, merged.dim_v);
  if (merged.log_sum_exp != nullptr) {
    merged.log_sum_exp = place(merged.stride_log_sum_exp, 1);
  }
  const std::vector<float> sinks(64, -0.5f);
  if (merged.sinks != nullptr) merged.sinks = sinks.data();
  for (wh_partial& part : parts) {
    part.out = place(part.stride_out, merged.dim_v);
    part.log_sum_exp = place(part.stride_log_sum_exp, 1);
  }
  (void)wh_merge(&merged, parts, count, nullptr);
  return 0;
}
