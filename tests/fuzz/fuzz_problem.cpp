// libFuzzer: any bytes as problem, limits and small tensors through the C ABI. Nothing may crash,
// and a call that succeeds must have stayed inside its tensors (AddressSanitizer watches).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/problem.h"
#include "core/quantised.h"
#include "widehead/widehead.h"

namespace {

// Elements from the first to the last; 0 when that is more than a fuzzer should allocate.
size_t span_of(const int64_t (&extents)[4], const int64_t (&strides)[4]) {
  __int128 last = 0;
  for (int i = 0; i < 4; ++i) {
    if (extents[i] <= 0 || strides[i] < 0) return 0;
    last += static_cast<__int128>(extents[i] - 1) * strides[i];
  }
  return last < (1 << 16) ? static_cast<size_t>(last) + 1 : 0;
}

// Nothing was too large to allocate.
bool holds(const std::vector<char>& data, const int64_t (&extents)[4]) {
  for (const int64_t extent : extents) {
    if (extent == 0) return true;
  }
  return !data.empty();
}

size_t element_bytes(int32_t dtype) { return wh::dtype_bytes(static_cast<wh::Dtype>(dtype)); }

size_t mask_element_bytes(const wh_problem& problem) {
  if (problem.mask == WH_MASK_BOOLEAN) return 1;
  return problem.mask == WH_MASK_ADDITIVE_F32 ? 4 : element_bytes(problem.dtype_q);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  wh_problem problem;
  wh_limits limits;
  wh_problem_init(&problem, sizeof(problem));
  wh_limits_init(&limits, sizeof(limits));
  std::memcpy(&problem, data, size < sizeof(problem) ? size : sizeof(problem));
  if (size > sizeof(problem)) {
    const size_t rest = size - sizeof(problem);
    std::memcpy(&limits, data + sizeof(problem), rest < sizeof(limits) ? rest : sizeof(limits));
  }
  // So is a size beyond the struct. Fields beyond the size have their defaults for the library, and
  // so must they here: tensors follow them.
  const wh_problem given = problem;
  wh_problem_init(&problem, sizeof(problem));
  std::memcpy(&problem, &given, std::min(given.size, sizeof(problem)));
  problem.size = std::min(given.size, sizeof(problem));
  limits.size = std::min(limits.size, sizeof(limits));
  limits.kernel = nullptr;  // a pointer made of fuzz is the caller's fault
  problem.device = 0;
  wh_plan* plan = nullptr;
  if (wh_plan_create(&problem, &limits, &plan) != WH_OK) {
    (void)wh_plan_explain(plan);  // WH_REFUSED leaves a plan to explain, anything else NULL
    wh_plan_destroy(plan);
    return 0;
  }
  const char* json = wh_plan_json(plan);
  wh_plan* again = nullptr;
  // A plan that was made must survive its own JSON.
  if (json != nullptr && wh_plan_from_json(json, std::strlen(json), &again) != WH_OK &&
      problem.scale == problem.scale) {
    __builtin_trap();
  }
  wh_plan_destroy(again);
  (void)wh_plan_explain(plan);
  const int64_t pairs_limit = 1 << 14;
  const bool is_small =
      problem.batch <= 4 && problem.heads_q <= 64 && problem.len_q <= 64 && problem.len_k <= 256 &&
      problem.batch * problem.heads_q * problem.len_q * problem.len_k <= pairs_limit &&
      problem.total_q <= 64 && problem.total_k <= 256 && problem.pages <= 64 &&
      problem.page_size <= 64 && problem.page_entries <= 64 && problem.stride_page_table <= 64 &&
      wh_plan_workspace_bytes(plan) < (64 << 20);
  if (is_small && limits.threads < 4) {
    const bool packs_queries = problem.query_layout == WH_QUERIES_PACKED;
    const bool packs_keys = problem.key_layout == WH_KEYS_PACKED;
    const bool has_pages = problem.key_layout == WH_KEYS_PAGED;
    const int64_t batch_q = packs_queries ? 1 : problem.batch;
    const int64_t queries = packs_queries ? problem.total_q : problem.len_q;
    const int64_t batch_k = packs_keys ? 1 : has_pages ? problem.pages : problem.batch;
    const int64_t keys = packs_keys  ? problem.total_k
                         : has_pages ? problem.page_size
                                     : problem.len_k;
    const int64_t q[] = {batch_q, problem.heads_q, queries, problem.dim_qk};
    const int64_t k[] = {batch_k, problem.heads_kv, keys, problem.dim_qk};
    const int64_t v[] = {batch_k, problem.heads_kv, keys, problem.dim_v};
    const int64_t out[] = {batch_q, problem.heads_q, queries, problem.dim_v};
    std::vector<char> q_data(span_of(q, problem.stride_q) * element_bytes(problem.dtype_q));
    // Any codes, NaN among them; elements are zeros.
    const auto stored = [&](int32_t format, size_t elements) {
      const auto quantised = static_cast<wh::Quantised>(format);
      std::vector<char> bytes(static_cast<size_t>(wh::stored_bytes(
          quantised, static_cast<wh::Dtype>(problem.dtype_kv), static_cast<int64_t>(elements))));
      for (size_t i = 0; quantised != wh::Quantised::kNone && i < bytes.size(); ++i) {
        bytes[i] = static_cast<char>(i * 37);
      }
      return bytes;
    };
    std::vector<char> k_data = stored(problem.quantised_k, span_of(k, problem.stride_k));
    std::vector<char> v_data = stored(problem.quantised_v, span_of(v, problem.stride_v));
    const auto scales_of = [&](int32_t kind, const int64_t(&of)[4], const int64_t(&strides)[4]) {
      const bool of_tensor = kind == WH_SCALES_TENSOR, of_token = kind == WH_SCALES_TOKEN_HEAD;
      const int64_t extents[] = {of_tensor  ? 1
                                 : of_token ? of[0]
                                            : problem.batch,
                                 of_tensor ? 1 : of[1], of_token ? of[2] : 1,
                                 kind == WH_SCALES_CHANNEL ? of[3] : 1};
      return std::vector<float>(kind == WH_SCALES_NONE ? 0 : span_of(extents, strides), 0.01f);
    };
    const std::vector<float> scales_k = scales_of(problem.scales_k, k, problem.stride_scales_k),
                             scales_v = scales_of(problem.scales_v, v, problem.stride_scales_v);
    const int32_t dtype_out =
        (problem.uses & WH_USES_F32_OUT) != 0 ? int32_t{WH_F32} : problem.dtype_q;
    std::vector<char> out_data(span_of(out, problem.stride_out) * element_bytes(dtype_out));
    const int64_t mask[] = {problem.batch, problem.heads_q, problem.len_q, problem.len_k};
    std::vector<char> mask_data;
    if (problem.mask != WH_MASK_NONE) {
      mask_data.resize(span_of(mask, problem.stride_mask) * mask_element_bytes(problem));
      // Some keys hidden, some not; as floats some small, some large.
      for (size_t i = 0; i < mask_data.size(); ++i) mask_data[i] = static_cast<char>(i % 5 * 25);
    }
    std::vector<char> d_out_data, dq_data, dk_data, dv_data;
    std::vector<float> d_sinks(static_cast<size_t>(problem.heads_q));
    const bool is_backward = problem.pass == WH_BACKWARD;
    if (is_backward) {
      d_out_data.resize(span_of(out, problem.stride_d_out) * element_bytes(problem.dtype_q));
      dq_data.resize(span_of(q, problem.stride_dq) * element_bytes(problem.dtype_q));
      dk_data.resize(span_of(k, problem.stride_dk) * element_bytes(problem.dtype_kv));
      dv_data.resize(span_of(v, problem.stride_dv) * element_bytes(problem.dtype_kv));
    }
    const bool has_gradients =
        !is_backward || (holds(d_out_data, out) && holds(dq_data, q) && holds(dk_data, k) &&
                         (holds(dv_data, v) || (problem.uses & WH_USES_VALUES_IN_KEYS) != 0));
    const bool allocated = has_gradients && holds(q_data, q) && holds(k_data, k) &&
                           holds(v_data, v) && holds(out_data, out) &&
                           (problem.mask == WH_MASK_NONE || holds(mask_data, mask));
    std::vector<float> sinks(static_cast<size_t>(problem.heads_q)),
        lse(static_cast<size_t>(batch_q * problem.heads_q * queries));
    std::vector<int32_t> lengths(static_cast<size_t>(problem.batch),
                                 static_cast<int32_t>(problem.len_k / 2)),
        starts(static_cast<size_t>(problem.batch), static_cast<int32_t>(problem.len_k / 4));
    const auto offsets = [&](int64_t total, int64_t most) {
      std::vector<int32_t> list(1);
      for (int64_t b = 0; b < problem.batch; ++b) {
        list.push_back(list.back() +
                       static_cast<int32_t>(std::min(total - list.back(), most / (1 + b % 3))));
      }
      return list;
    };
    const std::vector<int32_t> query_offsets = offsets(problem.total_q, problem.len_q),
                               key_offsets = offsets(problem.total_k, problem.len_k),
                               page_offsets = offsets(problem.page_entries, problem.len_k);
    std::vector<int32_t> page_table(static_cast<size_t>(
        problem.page_entries + problem.batch * problem.stride_page_table + problem.len_k));
    for (size_t i = 0; i < page_table.size(); ++i) {
      page_table[i] =
          static_cast<int32_t>(static_cast<int64_t>(i * 7) % std::max<int64_t>(1, problem.pages));
    }
    if (packs_keys) {
      for (size_t b = 0; b < lengths.size(); ++b) lengths[b] = key_offsets[b + 1] - key_offsets[b];
    }
    wh_tensors tensors;
    wh_tensors_init(&tensors, sizeof(tensors));
    tensors.q = q_data.data();
    tensors.k = k_data.data();
    if ((problem.uses & WH_USES_VALUES_IN_KEYS) == 0) tensors.v = v_data.data();
    tensors.scales_k = scales_k.data();
    tensors.scales_v = scales_v.data();
    tensors.out = out_data.data();
    tensors.mask = mask_data.data();
    tensors.sinks = sinks.data();
    tensors.key_lengths = lengths.data();
    tensors.key_starts = starts.data();
    tensors.log_sum_exp = lse.data();
    tensors.query_offsets = query_offsets.data();
    tensors.key_offsets = key_offsets.data();
    tensors.page_table = page_table.data();
    tensors.page_offsets = page_offsets.data();
    tensors.d_out = d_out_data.data();
    tensors.dq = dq_data.data();
    tensors.dk = dk_data.data();
    tensors.dv = dv_data.data();
    tensors.d_sinks = d_sinks.data();
    if (allocated) (void)wh_attention(&problem, &limits, &tensors, nullptr);
  }
  wh_plan_destroy(plan);
  return 0;
}
