// What the kernels that widen codes of a byte refuse of them, in words.
#pragma once

#include <gtest/gtest.h>

#include "core/problem.h"

namespace wh {

// `refusal(change)` is what a kernel says of e4m3 keys and values with scales of tokens, under bf16
// queries of 256 columns, after `change(problem)`.
template <typename Refusal>
void expect_code_refusals(const Refusal& refusal) {
  EXPECT_EQ(refusal([](Problem& p) { p.quantised_v = Quantised::kQ8_0; }),
            "widens e4m3 and int8, of keys and of values; some are q8_0");
  EXPECT_EQ(refusal([](Problem& p) { p.quantised_v = Quantised::kQ4_0; }),
            "widens e4m3 and int8, of keys and of values; some are q4_0");
  EXPECT_EQ(refusal([](Problem& p) { p.quantised_k = Quantised::kNone; }),
            "widens e4m3 and int8, of keys and of values; some are bf16");
  EXPECT_EQ(refusal([](Problem& p) { p.quantised_v = Quantised::kNone; }),
            "widens e4m3 and int8, of keys and of values; some are bf16");
  EXPECT_EQ(refusal([](Problem& p) { p.values_in_keys = true; }),
            "widens values of their own, not those within keys");
  EXPECT_EQ(
      refusal([](Problem& p) { p.scales_k = Scales::kChannel; }),
      "takes scales of keys per tensor, head or token; those of channels would round q again");
  EXPECT_EQ(refusal([](Problem& p) { p.scales_v = Scales::kChannel; }), "");
  EXPECT_EQ(refusal([](Problem& p) { p.dtype_q = p.dtype_kv = Dtype::kF16; }),
            "multiplies weights by the scales of tokens, which f16 does not hold; bf16 queries do");
  EXPECT_EQ(refusal([](Problem& p) { p.stride_k[2] = 264; }),
            "k has a stride of 264 codes; TMA needs a multiple of 16");
  EXPECT_EQ(refusal([](Problem& p) { p.stride_v[2] = 264; }),
            "v has a stride of 264 codes; TMA needs a multiple of 16");
}

}  // namespace wh
