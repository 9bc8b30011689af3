// The C ABI's answer to every kind of bad input: a message that says what is wrong, and no write.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "support/call.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct BadCall {
  const char* name;
  void (*spoil)(Call&);
  std::vector<const char*> message;  // all of these appear
};

// Queries and keys of two sequences, of 2 and 1 queries and of 3 and 2 keys.
void pack(Call& c) {
  static const int32_t queries[] = {0, 2, 3}, keys[] = {0, 3, 5};
  c.problem.batch = 2;
  c.problem.query_layout = WH_QUERIES_PACKED;
  c.problem.key_layout = WH_KEYS_PACKED;
  c.problem.total_q = 3;
  c.problem.total_k = 5;
  EXPECT_EQ(wh_problem_set_dense(&c.problem), WH_OK);
  c.tensors.query_offsets = queries;
  c.tensors.key_offsets = keys;
}

// The keys in two pages of 4, the second of which comes first.
void page(Call& c) {
  static const int32_t table[] = {1, 0};
  c.k.resize(8 * 8);
  c.v.resize(8 * 8);
  c.tensors.k = c.k.data();
  c.tensors.v = c.v.data();
  c.problem.key_layout = WH_KEYS_PAGED;
  c.problem.page_size = 4;
  c.problem.pages = 2;
  c.problem.uses = WH_USES_KEY_LENGTHS;
  EXPECT_EQ(wh_problem_set_dense(&c.problem), WH_OK);
  c.tensors.key_lengths = c.lengths.data();
  c.tensors.page_table = table;
}

template <int32_t... values>
const int32_t* ints() {
  static const int32_t list[] = {values...};
  return list;
}

const BadCall kBadCalls[] = {
    {"query_layout", [](Call& c) { c.problem.query_layout = 2; }, {"query_layout is 2"}},
    {"key_layout", [](Call& c) { c.problem.key_layout = -1; }, {"key_layout is -1"}},
    {"total_q_of_dense", [](Call& c) { c.problem.total_q = 3; }, {"total_q is 3", "must be 0"}},
    {"page_size_of_dense", [](Call& c) { c.problem.page_size = 16; }, {"page_size is 16"}},
    {"no_page_size",
     [](Call& c) {
       page(c);
       c.problem.page_size = 0;
     },
     {"page_size is 0", "at least 1"}},
    {"pages_without_lengths",
     [](Call& c) {
       page(c);
       c.problem.uses = 0;
     },
     {"no key_lengths", "0 to len_k"}},
    {"mask_over_packed",
     [](Call& c) {
       pack(c);
       c.problem.mask = WH_MASK_BOOLEAN;
     },
     {"mask is boolean", "queries are packed"}},
    {"backward_of_pages",
     [](Call& c) {
       page(c);
       c.problem.pass = WH_BACKWARD;
     },
     {"pass is backward", "must be dense"}},
    {"null_query_offsets",
     [](Call& c) {
       pack(c);
       c.tensors.query_offsets = nullptr;
     },
     {"query_offsets is null"}},
    {"first_offset",
     [](Call& c) {
       pack(c);
       c.tensors.query_offsets = ints<1, 2, 3>();
     },
     {"query_offsets[0] is 1", "must be 0"}},
    {"falling_offsets",
     [](Call& c) {
       pack(c);
       c.tensors.key_offsets = ints<0, 3, 2>();
     },
     {"key_offsets[2] is 2", "between key_offsets[1], 3, and total_k, 5"}},
    {"offsets_past_the_end",
     [](Call& c) {
       pack(c);
       c.tensors.query_offsets = ints<0, 2, 4>();
     },
     {"query_offsets[2] is 4", "total_q, 3"}},
    {"a_long_sequence",
     [](Call& c) {
       pack(c);
       c.problem.len_k = 2;
     },
     {"key_offsets[1] is 3, 3 after the one before", "the most, is 2"}},
    {"packed_key_lengths",
     [](Call& c) {
       pack(c);
       c.problem.uses = WH_USES_KEY_LENGTHS;
       c.tensors.key_lengths = ints<3, 3>();
     },
     {"key_lengths[1] is 3", "packed keys, 2"}},
    {"negative_page",
     [](Call& c) {
       page(c);
       c.tensors.page_table = ints<1, -1>();
     },
     {"page_table[1] is -1", "page 1 of sequence 0", "between 0 and 1"}},
    {"page_beyond_the_pool",
     [](Call& c) {
       page(c);
       c.tensors.page_table = ints<2, 0>();
     },
     {"page_table[0] is 2", "between 0 and 1"}},
    {"pages_too_few",
     [](Call& c) {
       page(c);
       c.problem.uses |= WH_USES_PAGE_OFFSETS;
       c.problem.page_entries = 2;
       c.problem.stride_page_table = 0;
       c.tensors.page_offsets = ints<0, 1>();
     },
     {"key_lengths[0] is 5", "at most 4", "page_offsets[1]"}},
    {"more_sequences_than_planned",
     [](Call& c) { c.tensors.batch = 2; },
     {"tensors.batch is 2", "0 and 1"}},
    {"batch", [](Call& c) { c.problem.batch = -1; }, {"batch is -1", "between 0"}},
    {"heads", [](Call& c) { c.problem.heads_kv = 4; }, {"heads_q is 2", "multiple of heads_kv"}},
    {"no_heads", [](Call& c) { c.problem.heads_kv = 0; }, {"heads_kv is 0", "between 1"}},
    {"len_q", [](Call& c) { c.problem.len_q = int64_t{1} << 40; }, {"len_q is 1099511627776"}},
    {"dim_qk", [](Call& c) { c.problem.dim_qk = 0; }, {"dim_qk is 0", "between 1 and 1024"}},
    {"dim_v", [](Call& c) { c.problem.dim_v = 1025; }, {"dim_v is 1025", "between 1 and 1024"}},
    {"stride",
     [](Call& c) { c.problem.stride_k[2] = -8; },
     {"stride_k[2] is -8", "not be negative"}},
    {"wide_stride",
     [](Call& c) { c.problem.stride_q[2] = std::numeric_limits<int64_t>::max() / 2; },
     {"stride_q", "64-bit"}},
    {"out_overlaps_itself",
     [](Call& c) { c.problem.stride_out[2] = 4; },
     {"stride_out[2] is 4", "at least 8"}},
    {"scale", [](Call& c) { c.problem.scale = kNan; }, {"scale is nan", "finite"}},
    {"softcap", [](Call& c) { c.problem.softcap = -1; }, {"softcap is -1", "positive"}},
    {"window", [](Call& c) { c.problem.window_left = -2; }, {"window_left is -2", "between -1"}},
    {"dtype_q", [](Call& c) { c.problem.dtype_q = 9; }, {"dtype_q is 9", "between 0 and 2"}},
    {"dtype_kv", [](Call& c) { c.problem.dtype_kv = -1; }, {"dtype_kv is -1"}},
    {"causal", [](Call& c) { c.problem.causal = 3; }, {"causal is 3", "between 0 and 2"}},
    {"mask", [](Call& c) { c.problem.mask = 7; }, {"mask is 7", "between 0 and 3"}},
    {"device", [](Call& c) { c.problem.device = 2; }, {"device is 2", "between 0 and 1"}},
    {"quantised_k",
     [](Call& c) { c.problem.quantised_k = 5; },
     {"quantised_k is 5", "between 0 and 4"}},
    {"quantised_v",
     [](Call& c) { c.problem.quantised_v = -1; },
     {"quantised_v is -1", "between 0 and 4"}},
    {"scales", [](Call& c) { c.problem.scales_v = 9; }, {"scales_v is 9", "between 0 and 4"}},
    {"scales_of_elements",
     [](Call& c) { c.problem.scales_k = WH_SCALES_HEAD; },
     {"scales_k is head", "must be none where quantised_k is none"}},
    {"scales_of_blocks",
     [](Call& c) {
       c.problem.quantised_v = WH_Q8_0;
       c.problem.scales_v = WH_SCALES_TENSOR;
     },
     {"scales_v is tensor", "must be none where quantised_v is q8_0"}},
    {"half_a_block",
     [](Call& c) { c.problem.quantised_k = WH_Q4_0; },
     {"dim_qk is 8", "q4_0", "a multiple of 32"}},
    {"block_stride",
     [](Call& c) {
       c.problem.dim_v = 32;
       c.problem.quantised_v = WH_Q8_0;
       EXPECT_EQ(wh_problem_set_dense(&c.problem), WH_OK);
       c.problem.stride_v[2] = 40;
     },
     {"stride_v[2] is 40", "q8_0", "a multiple of 32"}},
    {"scale_stride",
     [](Call& c) {
       c.problem.quantised_k = WH_INT8;
       c.problem.scales_k = WH_SCALES_CHANNEL;
       c.problem.stride_scales_k[3] = -1;
     },
     {"stride_scales_k[3] is -1", "not be negative"}},
    {"null_scales",
     [](Call& c) {
       c.problem.quantised_v = WH_E4M3;
       c.problem.scales_v = WH_SCALES_TENSOR;
     },
     {"scales_v is null"}},
    {"values_quantised_beside_keys",
     [](Call& c) {
       c.problem.uses = WH_USES_VALUES_IN_KEYS;
       c.problem.quantised_k = WH_E4M3;
     },
     {"quantised_v is none", "as v lies in k it must be e4m3"}},
    {"gradients_of_codes",
     [](Call& c) {
       c.problem.pass = WH_BACKWARD;
       c.problem.quantised_k = WH_E4M3;
     },
     {"quantised_k is e4m3", "none in the backward pass"}},
    {"uses", [](Call& c) { c.problem.uses = 1024; }, {"uses is 0x400", "0x7f"}},
    {"values_wider_than_keys",
     [](Call& c) {
       c.problem.uses = WH_USES_VALUES_IN_KEYS;
       c.problem.dim_v = 9;
     },
     {"dim_v is", "at most dim_qk"}},
    {"values_beside_keys",
     [](Call& c) {
       c.problem.uses = WH_USES_VALUES_IN_KEYS;
       c.problem.stride_v[2] += 8;
     },
     {"stride_v[2] is", "must be stride_k[2]"}},
    {"values_elsewhere",
     [](Call& c) { c.problem.uses = WH_USES_VALUES_IN_KEYS; },
     {"v is 0x", "must be null or k"}},
    {"problem_size", [](Call& c) { c.problem.size = 8; }, {"problem.size is 8", "wh_problem_init"}},
    {"limits_size", [](Call& c) { c.limits.size = 0; }, {"limits.size is 0", "wh_limits_init"}},
    {"tensors_size", [](Call& c) { c.tensors.size = 1 << 20; }, {"tensors.size is 1048576"}},
    {"options_size", [](Call& c) { c.options.size = 3; }, {"run_options.size is 3"}},
    {"policy", [](Call& c) { c.limits.policy = 5; }, {"limits.policy is 5", "between 0 and 2"}},
    {"precision", [](Call& c) { c.limits.precision = -1; }, {"limits.precision is -1"}},
    {"threads", [](Call& c) { c.limits.threads = -4; }, {"limits.threads is -4", "every core"}},
    {"fused_above", [](Call& c) { c.limits.fused_above = -1; }, {"limits.fused_above is -1"}},
    {"longest_step",
     [](Call& c) { c.limits.longest_step_us = kNan; },
     {"limits.longest_step_us is nan"}},
    {"kernel",
     [](Call& c) { c.limits.kernel = "cpu_prefil"; },
     {"\"cpu_prefil\"", "did you mean \"cpu_prefill\"?"}},
    {"null_q", [](Call& c) { c.tensors.q = nullptr; }, {"q is null"}},
    {"null_out", [](Call& c) { c.tensors.out = nullptr; }, {"out is null"}},
    {"null_mask", [](Call& c) { c.problem.mask = WH_MASK_BOOLEAN; }, {"mask is null"}},
    {"null_lse", [](Call& c) { c.problem.uses = WH_USES_LOG_SUM_EXP; }, {"log_sum_exp is null"}},
    {"null_sinks", [](Call& c) { c.problem.uses = WH_USES_SINKS; }, {"sinks is null"}},
    {"out_over_q", [](Call& c) { c.tensors.out = c.q.data() + 4; }, {"out overlaps q"}},
    {"out_over_v", [](Call& c) { c.tensors.v = c.out.data() + 1; }, {"out overlaps v"}},
    {"lse_over_out",
     [](Call& c) {
       c.problem.uses = WH_USES_LOG_SUM_EXP;
       c.tensors.log_sum_exp = c.out.data() + 6;
     },
     {"out overlaps log_sum_exp", "out, 192 bytes at 0x", "log_sum_exp, 24 bytes at 0x",
      "must share no memory"}},
    {"lse_over_sinks",
     [](Call& c) {
       static std::vector<float> both(8);
       c.problem.uses = WH_USES_LOG_SUM_EXP | WH_USES_SINKS;
       c.tensors.log_sum_exp = both.data();
       c.tensors.sinks = both.data() + 5;
     },
     {"log_sum_exp overlaps sinks"}},
    {"workspace_over_k",
     [](Call& c) {
       alignas(64) static char workspace[8 << 20];
       c.tensors.workspace = workspace;
       c.tensors.workspace_bytes = sizeof(workspace);
       c.tensors.k = workspace + 64;
     },
     {"workspace overlaps k (workspace, ", "; k, 160 bytes at 0x"}},
    {"workspace_over_out",
     [](Call& c) {
       alignas(64) static char workspace[8 << 20];
       c.tensors.workspace = workspace;
       c.tensors.workspace_bytes = SIZE_MAX;
       c.tensors.out = workspace;
     },
     {"out overlaps workspace"}},
    {"misaligned_q",
     [](Call& c) { c.tensors.q = reinterpret_cast<char*>(c.q.data()) + 2; },
     {"q is at 0x", "aligned to its elements of 4 bytes"}},
    {"misaligned_k",
     [](Call& c) {
       c.problem.dtype_kv = WH_F16;
       c.tensors.k = reinterpret_cast<char*>(c.k.data()) + 1;
     },
     {"k is at 0x", "aligned to its elements of 2 bytes"}},
    {"misaligned_scales",
     [](Call& c) {
       alignas(4) static char scales[8];
       c.problem.quantised_k = WH_E4M3;
       c.problem.scales_k = WH_SCALES_TENSOR;
       c.tensors.scales_k = reinterpret_cast<float*>(scales + 2);
     },
     {"scales_k is at 0x", "aligned to its elements of 4 bytes"}},
    {"misaligned_v",
     [](Call& c) { c.tensors.v = reinterpret_cast<char*>(c.v.data()) + 1; },
     {"v is at 0x", "4 bytes"}},
    {"misaligned_out",
     [](Call& c) {
       alignas(4) static char out[256];
       c.tensors.out = out + 3;
     },
     {"out is at 0x", "4 bytes"}},
    {"misaligned_mask",
     [](Call& c) {
       alignas(4) static char mask[256];
       c.problem.mask = WH_MASK_ADDITIVE_F32;
       c.tensors.mask = mask + 2;
     },
     {"mask is at 0x", "4 bytes"}},
    {"misaligned_lse",
     [](Call& c) {
       alignas(4) static char lse[64];
       c.problem.uses = WH_USES_LOG_SUM_EXP;
       c.tensors.log_sum_exp = reinterpret_cast<float*>(lse + 2);
     },
     {"log_sum_exp is at 0x", "4 bytes"}},
    {"misaligned_sinks",
     [](Call& c) {
       alignas(4) static char sinks[16];
       c.problem.uses = WH_USES_SINKS;
       c.tensors.sinks = reinterpret_cast<float*>(sinks + 1);
     },
     {"sinks is at 0x", "4 bytes"}},
    {"misaligned_key_lengths",
     [](Call& c) {
       alignas(4) static char lengths[16];
       c.problem.uses = WH_USES_KEY_LENGTHS;
       c.tensors.key_lengths = reinterpret_cast<int32_t*>(lengths + 2);
     },
     {"key_lengths is at 0x", "4 bytes"}},
    {"misaligned_key_starts",
     [](Call& c) {
       alignas(4) static char starts[16];
       c.problem.uses = WH_USES_KEY_STARTS;
       c.tensors.key_starts = reinterpret_cast<int32_t*>(starts + 2);
     },
     {"key_starts is at 0x", "4 bytes"}},
    {"key_lengths",
     [](Call& c) {
       c.problem.uses = WH_USES_KEY_LENGTHS;
       c.lengths[0] = 6;
       c.tensors.key_lengths = c.lengths.data();
     },
     {"key_lengths[0] is 6", "between 0 and len_k, 5"}},
    {"key_starts",
     [](Call& c) {
       c.problem.uses = WH_USES_KEY_STARTS;
       c.starts[0] = -1;
       c.tensors.key_starts = c.starts.data();
     },
     {"key_starts[0] is -1", "not be negative"}},
    {"small_workspace",
     [](Call& c) {
       alignas(64) static char workspace[64];
       c.tensors.workspace = workspace;
       c.tensors.workspace_bytes = 64;
     },
     {"workspace_bytes is 64", "the plan takes"}},
    {"misaligned_workspace",
     [](Call& c) {
       alignas(64) static char workspace[8 << 20];
       c.tensors.workspace = workspace + 4;
       c.tensors.workspace_bytes = (8 << 20) - 4;
     },
     {"workspace is 0x", "aligned to 64 bytes"}},
    {"executor",
     [](Call& c) {
       static const wh_executor executor{nullptr, nullptr};
       c.options.executor = &executor;
     },
     {"executor.parallel is null"}},
};

class BadCalls : public testing::TestWithParam<BadCall> {};

TEST_P(BadCalls, AnswerWithWhatIsWrongAndTouchNothing) {
  Call call;
  GetParam().spoil(call);
  ASSERT_EQ(call.run(), WH_INVALID_ARGUMENT);
  for (const char* part : GetParam().message) {
    EXPECT_NE(std::string(wh_last_error()).find(part), std::string::npos) << wh_last_error();
  }
  EXPECT_TRUE(call.out_is_untouched());
}

INSTANTIATE_TEST_SUITE_P(CApi, BadCalls, testing::ValuesIn(kBadCalls),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(CApi, NullArgumentsAreErrors) {
  Call call;
  wh_plan* plan = nullptr;
  EXPECT_EQ(wh_attention(nullptr, nullptr, &call.tensors, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(), "problem is null");
  EXPECT_EQ(wh_attention(&call.problem, nullptr, nullptr, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(), "tensors is null");
  EXPECT_EQ(wh_plan_create(&call.problem, nullptr, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_EQ(wh_plan_run(nullptr, &call.tensors, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_EQ(wh_plan_problem(nullptr, &call.problem), WH_INVALID_ARGUMENT);
  EXPECT_EQ(wh_plan_from_json(nullptr, 0, &plan), WH_INVALID_ARGUMENT);
  EXPECT_EQ(wh_problem_init(nullptr, sizeof(wh_problem)), WH_INVALID_ARGUMENT);
  EXPECT_EQ(wh_problem_init(&call.problem, 4), WH_INVALID_ARGUMENT);
  EXPECT_EQ(wh_plan_explain(nullptr), nullptr);
  EXPECT_STREQ(wh_plan_kernel(nullptr), "");
  wh_plan_destroy(nullptr);
  EXPECT_EQ(wh_kernel_name(WH_CPU, 100), nullptr);
  EXPECT_EQ(wh_kernel_name(7, 0), nullptr);
  EXPECT_EQ(wh_device_json(7, 0), nullptr);
}

TEST(CApi, ErrorsBelongToTheirThread) {
  Call call;
  call.problem.batch = -5;
  ASSERT_EQ(call.run(), WH_INVALID_ARGUMENT);
  const std::string message = wh_last_error();
  Call good;
  ASSERT_EQ(good.run(), WH_OK);
  EXPECT_EQ(message, wh_last_error());
}

}  // namespace
}  // namespace wh
