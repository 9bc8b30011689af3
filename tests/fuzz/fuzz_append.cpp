// libFuzzer: any bytes as the problem of a cache, as what is appended to it, and as slots. Nothing
// may crash, and an append that succeeds must have stayed inside its tensors (AddressSanitizer
// watches).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "api/c_structs.h"
#include "core/layout_checks.h"
#include "widehead/widehead.h"

namespace {

constexpr int64_t kMostBytes = 1 << 18;

std::vector<double> memory(int64_t bytes) {
  return std::vector<double>(
      bytes < 0 || bytes > kMostBytes ? 0 : static_cast<size_t>((bytes + 7) / 8), 0.5);
}

int64_t row_bytes(const wh_appended& a, const int64_t (&stride)[3], int64_t heads, int64_t dim) {
  if (a.tokens < 0) return 0;
  for (const int64_t step : stride) {
    if (step < 0 || step > kMostBytes) return 0;
  }
  return 4 * wh::span_elements({1, a.tokens, heads, dim}, {0, stride[0], stride[1], stride[2]});
}

template <typename Struct>
const uint8_t* take(Struct& to, const uint8_t* data, const uint8_t* end) {
  const size_t bytes = std::min(sizeof(to), static_cast<size_t>(end - data));
  std::memcpy(&to, data, bytes);
  // A size beyond the struct is the caller's fault.
  to.size = std::min(to.size, sizeof(to));
  return data + bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  wh_problem problem;
  wh_appended appended;
  if (wh_problem_init(&problem, sizeof(problem)) != WH_OK) __builtin_trap();
  if (wh_appended_init(&appended, sizeof(appended)) != WH_OK) __builtin_trap();
  const uint8_t* const end = data + size;
  data = take(problem, data, end);
  data = take(appended, data, end);
  appended.tokens = std::min<int64_t>(appended.tokens, 64);
  std::vector<int64_t> slots(64, -1);
  for (size_t i = 0; i < slots.size() && data < end; ++i) slots[i] = static_cast<int8_t>(*data++);
  // Pointers made of fuzz are the caller's fault too: memory for what the problem says, or none.
  wh::Problem cache;
  wh::TensorBytes bytes;
  if (wh::read_problem(&problem, cache).ok()) {
    bytes = wh::tensor_bytes(cache);
  } else {
    cache = {};  // half read: extents may be anything
  }
  std::vector<double> k = memory(bytes.k), v = memory(bytes.v), scales_k = memory(bytes.scales_k),
                      scales_v = memory(bytes.scales_v);
  std::vector<double> new_k =
      memory(row_bytes(appended, appended.stride_new_k, cache.heads_kv, cache.dim_qk));
  std::vector<double> new_v =
      memory(row_bytes(appended, appended.stride_new_v, cache.heads_kv, cache.dim_v));
  const auto data_of = [](std::vector<double>& of) -> void* {
    return of.empty() ? nullptr : of.data();
  };
  appended.slots = slots.data();
  appended.k = data_of(k);
  appended.v = data_of(v);
  appended.scales_k = static_cast<float*>(data_of(scales_k));
  appended.scales_v = static_cast<float*>(data_of(scales_v));
  appended.new_k = data_of(new_k);
  appended.new_v = data_of(new_v);
  (void)wh_append(&problem, &appended, nullptr);
  return 0;
}
