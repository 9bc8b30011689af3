// The stored formats: every code, every tie, and ggml's blocks byte by byte.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/kv_tensor.h"
#include "core/names.h"
#include "core/quantised.h"
#include "cuda/common/kv_codes.h"

namespace wh {
namespace {

// By the definition, not by the code under test.
double e4m3_value(int code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const double sign = code & 0x80 ? -1 : 1;
  if ((code & 0x7f) == 0x7f) return std::nan("");
  if (exponent == 0) return sign * mantissa / 8.0 * std::pow(2.0, -6);
  return sign * (1 + mantissa / 8.0) * std::pow(2.0, exponent - 7);
}

uint8_t code_of(float value) { return from_float<E4m3>(value).bits; }

TEST(Quantised, EveryE4m3CodeWidensExactlyAndComesBack) {
  for (int code = 0; code < 256; ++code) {
    const float value = to_float(E4m3{static_cast<uint8_t>(code)});
    const double wanted = e4m3_value(code);
    if (std::isnan(wanted)) {
      EXPECT_TRUE(std::isnan(value)) << code;
    } else {
      EXPECT_EQ(value, wanted) << code;
      EXPECT_EQ(std::signbit(value), (code & 0x80) != 0) << code;
    }
    EXPECT_EQ(code_of(value), code);
  }
  EXPECT_EQ(e4m3_value(0x7e), 448);
}

TEST(Quantised, E4m3RoundsToNearestEven) {
  for (int code = 0; code < 0x7e; ++code) {
    const auto low = static_cast<float>(e4m3_value(code));
    const auto high = static_cast<float>(e4m3_value(code + 1));
    const float middle = (low + high) / 2;  // exact
    const int even = code % 2 == 0 ? code : code + 1;
    EXPECT_EQ(code_of(middle), even) << code;
    EXPECT_EQ(code_of(std::nextafter(middle, low)), code) << code;
    EXPECT_EQ(code_of(std::nextafter(middle, high)), code + 1) << code;
    EXPECT_EQ(code_of(-middle), even | 0x80) << code;
  }
}

TEST(Quantised, E4m3HasNoInfinity) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(code_of(449), 0x7e);
  EXPECT_EQ(code_of(1e30f), 0x7e);
  EXPECT_EQ(code_of(kInfinity), 0x7e);
  EXPECT_EQ(code_of(-kInfinity), 0xfe);
  EXPECT_EQ(code_of(std::numeric_limits<float>::quiet_NaN()), 0x7f);
  EXPECT_EQ(code_of(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(code_of(-0.0f), 0x80);
}

TEST(Quantised, Int8RoundsToNearestEvenAndIsSymmetric) {
  for (int code = -128; code <= 127; ++code) {
    EXPECT_EQ(to_float(Int8{static_cast<int8_t>(code)}), code);
  }
  for (int code = -127; code < 127; ++code) {
    const auto low = static_cast<float>(code);
    EXPECT_EQ(from_float<Int8>(low).bits, code);
    EXPECT_EQ(from_float<Int8>(low + 0.5f).bits, code % 2 == 0 ? code : code + 1);
    EXPECT_EQ(from_float<Int8>(std::nextafter(low + 0.5f, -1000.0f)).bits, code);
    EXPECT_EQ(from_float<Int8>(std::nextafter(low + 0.5f, 1000.0f)).bits, code + 1);
  }
  EXPECT_EQ(from_float<Int8>(1e9f).bits, 127);
  EXPECT_EQ(from_float<Int8>(-std::numeric_limits<float>::infinity()).bits, -127);
  EXPECT_EQ(from_float<Int8>(std::numeric_limits<float>::quiet_NaN()).bits, 0);
}

// Blocks as ggml's headers describe them, written by hand: f16 2.0 is 0x4000, little-endian.
TEST(Quantised, BlocksLieAsGgmlWritesThem) {
  std::vector<uint8_t> bytes{0x00, 0x40};
  for (int i = 0; i < 32; ++i) bytes.push_back(static_cast<uint8_t>(i - 16));
  Q8_0 eight;
  ASSERT_EQ(bytes.size(), sizeof(eight));
  std::memcpy(&eight, bytes.data(), sizeof(eight));
  for (int i = 0; i < 32; ++i) EXPECT_EQ(to_float(eight, i), 2.0f * static_cast<float>(i - 16));

  bytes = {0x00, 0x40};
  for (int i = 0; i < 16; ++i) bytes.push_back(static_cast<uint8_t>(i | (15 - i) << 4));
  Q4_0 four;
  ASSERT_EQ(bytes.size(), sizeof(four));
  std::memcpy(&four, bytes.data(), sizeof(four));
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(to_float(four, i), 2.0f * static_cast<float>(i - 8));
    EXPECT_EQ(to_float(four, i + 16), 2.0f * static_cast<float>(7 - i));
  }
}

// What CUDA kernels widen by is what the definition of an element says, for every byte there is.
void expect_elements(const KvTensor& tensor, const KvPlace& place) {
  const auto* bytes = static_cast<const uint8_t*>(tensor.data);
  for (int column = 0; column < tensor.dim; column += 4) {
    const cuda::CodesAt at = cuda::codes_at(tensor.format, tensor.offset(place), column);
    uint32_t word = 0;
    std::memcpy(&word, bytes + at.codes, sizeof(word));
    float widened[4];
    cuda::widen_codes(tensor.format, column, word, widened);
    for (int i = 0; i < 4; ++i) {
      Half of_block{};
      std::memcpy(&of_block, bytes + at.scale, sizeof(of_block));
      const float scale =
          is_block_format(tensor.format) ? to_float(of_block) : tensor.scale(place, column + i);
      const float have = widened[i] * scale, wanted = tensor.element(place, column + i);
      if (std::isnan(wanted)) {
        EXPECT_TRUE(std::isnan(have)) << column + i;
      } else {
        EXPECT_EQ(std::bit_cast<uint32_t>(have), std::bit_cast<uint32_t>(wanted))
            << kQuantiseds.name(tensor.format) << " " << column + i;
      }
    }
  }
}

TEST(Quantised, DevicesWidenToTheSameElements) {
  constexpr int64_t kDim = 256, kHeads = 2, kTokens = 5;
  std::mt19937 random(7);
  std::vector<float> scales(kHeads * kTokens * kDim);
  for (float& scale : scales) scale = std::normal_distribution<float>()(random);
  scales[3] = 0, scales[4] = 1e-42f, scales[5] = 3e38f;
  alignas(16) uint8_t bytes[kHeads * kTokens * kDim / 32 * sizeof(Q8_0)];
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  for (int i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(i);
  for (const Quantised format :
       {Quantised::kE4m3, Quantised::kInt8, Quantised::kQ8_0, Quantised::kQ4_0}) {
    for (const Scales kind :
         {Scales::kNone, Scales::kTensor, Scales::kHead, Scales::kTokenHead, Scales::kChannel}) {
      if (is_block_format(format) && kind != Scales::kNone) continue;
      const float* of_codes = kind == Scales::kNone ? nullptr : scales.data();
      const KvTensor tensor{.data = bytes,
                            .scales_data = of_codes,
                            .dtype = Dtype::kF32,
                            .format = format,
                            .scales = kind,
                            .stride = dense_strides(kHeads, kTokens, kDim),
                            .stride_scales = {kHeads * kDim, kDim, 1, 1},
                            .dim = kDim};
      EXPECT_TRUE(cuda::is_whole_words(tensor));
      for (int64_t head = 0; head < kHeads; ++head) {
        for (int64_t token = 0; token < kTokens; ++token) {
          expect_elements(tensor, {0, head, token, 0});
        }
      }
    }
  }
}

TEST(Quantised, WordsOfCodesAreWholeWhereRowsAreAligned) {
  KvTensor tensor{.data = reinterpret_cast<const void*>(uintptr_t{64}),
                  .scales_data = nullptr,
                  .dtype = Dtype::kF32,
                  .format = Quantised::kInt8,
                  .scales = Scales::kNone,
                  .stride = {64, 64, 28, 1},
                  .stride_scales = {},
                  .dim = 24};
  const KvTensor whole = tensor;
  EXPECT_TRUE(cuda::is_whole_words(whole));
  tensor.stride[2] = 26;
  EXPECT_FALSE(cuda::is_whole_words(tensor));
  tensor = whole, tensor.dim = 22;
  EXPECT_FALSE(cuda::is_whole_words(tensor));
  tensor = whole, tensor.stride[3] = 2;
  EXPECT_FALSE(cuda::is_whole_words(tensor));
  tensor = whole, tensor.data = reinterpret_cast<const void*>(uintptr_t{66});
  EXPECT_FALSE(cuda::is_whole_words(tensor));
}

TEST(Quantised, BlocksAreWrittenAsGgmlReadsThem) {
  // A step of 1 that f16 has: rounding moves nothing, so the bytes are known.
  float row[64] = {};
  row[0] = 127, row[1] = -3, row[31] = 5, row[32] = -8, row[33] = 7, row[47] = -1, row[48] = 2;
  Q8_0 eight[2];
  quantise_row(row, 64, Quantised::kQ8_0, nullptr, 0, eight);
  EXPECT_EQ(eight[0].scale.bits, 0x3c00);  // 1.0
  EXPECT_EQ(eight[0].codes[0], 127);
  EXPECT_EQ(eight[0].codes[1], -3);
  EXPECT_EQ(eight[0].codes[2], 0);
  EXPECT_EQ(eight[0].codes[31], 5);
  Q4_0 four[2];
  quantise_row(row, 64, Quantised::kQ4_0, nullptr, 0, four);
  EXPECT_EQ(four[1].scale.bits, 0x3c00);
  EXPECT_EQ(four[1].codes[0], 0 | (2 + 8) << 4);  // elements 32 and 48
  EXPECT_EQ(four[1].codes[1], (7 + 8) | 8 << 4);
  EXPECT_EQ(four[1].codes[15], (-1 + 8) | 8 << 4);
}

TEST(Quantised, RowsComeBackWithinHalfAStep) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> row(96);
  for (int i = 0; i < 200; ++i) {
    for (float& x : row) x = normal(random);
    for (const Quantised format : {Quantised::kInt8, Quantised::kE4m3}) {
      const float scale = scale_of_row(row.data(), 96, format);
      std::vector<uint8_t> codes(96);
      quantise_row(row.data(), 96, format, &scale, 0, codes.data());
      for (size_t d = 0; d < 96; ++d) {
        const bool is_int8 = format == Quantised::kInt8;
        const float value =
            is_int8 ? to_float(Int8{static_cast<int8_t>(codes[d])}) : to_float(E4m3{codes[d]});
        const float step = is_int8 ? scale : std::max(std::fabs(row[d]) / 8, scale * 0x1p-9f);
        EXPECT_LE(std::fabs(value * scale - row[d]), step * 0.5001f);
      }
    }
    Q8_0 eight[3];
    quantise_row(row.data(), 96, Quantised::kQ8_0, nullptr, 0, eight);
    Q4_0 four[3];
    quantise_row(row.data(), 96, Quantised::kQ4_0, nullptr, 0, four);
    for (int64_t d = 0; d < 96; ++d) {
      const float x = row[static_cast<size_t>(d)];
      const float step_8 = to_float(eight[d / 32].scale), step_4 = to_float(four[d / 32].scale);
      EXPECT_LE(std::fabs(to_float(eight[d / 32], d % 32) - x), step_8 * 0.57f);  // 127 clamps
      EXPECT_LE(std::fabs(to_float(four[d / 32], d % 32) - x), std::fabs(step_4) * 1.01f);
    }
  }
}

TEST(Quantised, EmptyAndSpoiltRows) {
  std::vector<float> row(32, 0.0f);
  EXPECT_EQ(scale_of_row(row.data(), 32, Quantised::kInt8), 0);
  const float scale = 0;
  std::vector<uint8_t> codes(32, 0xaa);
  quantise_row(row.data(), 32, Quantised::kE4m3, &scale, 0, codes.data());
  EXPECT_EQ(codes, std::vector<uint8_t>(32, 0));
  Q4_0 four;
  quantise_row(row.data(), 32, Quantised::kQ4_0, nullptr, 0, &four);
  EXPECT_EQ(to_float(four, 5), 0);
  // A NaN has no code of int8: the row's scale says that it was there.
  row[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(scale_of_row(row.data(), 32, Quantised::kInt8)));
  Q8_0 eight;
  quantise_row(row.data(), 32, Quantised::kQ8_0, nullptr, 0, &eight);
  EXPECT_TRUE(std::isnan(to_float(eight, 0)));
  // Infinity over infinity, and NaN of either sign, are the one NaN.
  row[7] = std::numeric_limits<float>::infinity();
  const float of_row = scale_of_row(row.data(), 32, Quantised::kE4m3);
  EXPECT_EQ(of_row, row[7]);
  row[8] = std::copysign(std::numeric_limits<float>::quiet_NaN(), -1.0f);
  quantise_row(row.data(), 32, Quantised::kE4m3, &of_row, 0, codes.data());
  EXPECT_EQ(codes[7], 0x7f);
  EXPECT_EQ(codes[8], 0x7f);
  EXPECT_EQ(codes[9], 0);
}

TEST(Quantised, TheFirstOfTheFarthestElementsHasTheSign) {
  float row[32] = {1, -3, 3, -2};
  const auto of = [&](int64_t i) { return row[i]; };
  EXPECT_EQ(largest_of(of, 32), -3);
  EXPECT_EQ(largest_of(of, 1), 1);
  EXPECT_EQ(largest_of(of, 0), 0);
  row[31] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(largest_of(of, 31), -3);
  EXPECT_TRUE(std::isnan(largest_of(of, 32)));
  row[31] = -std::numeric_limits<float>::infinity();
  EXPECT_EQ(largest_of(of, 32), row[31]);
}

}  // namespace
}  // namespace wh
