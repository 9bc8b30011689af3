#include "cases.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "layouts.h"

namespace wh {
namespace {

struct Dims {
  int64_t qk, v;
};

// What models have, what kernels are compiled for, and what lies between and is padded.
constexpr Dims kDims[] = {{1, 1},     {7, 7},     {13, 5},    {24, 24},    {40, 40},   {48, 48},
                          {64, 64},   {72, 72},   {80, 80},   {96, 96},    {100, 100}, {112, 112},
                          {128, 128}, {136, 136}, {160, 160}, {192, 128},  {192, 192}, {192, 256},
                          {248, 248}, {256, 256}, {264, 264}, {320, 256},  {384, 384}, {512, 512},
                          {520, 392}, {544, 488}, {576, 512}, {1024, 1024}};
// Around the edges of every tile: SIMD vectors, panels of 24 and 48 rows, tiles of 64 to 192 rows
// and 64 to 176 keys.
constexpr int64_t kLengths[] = {1,   2,   3,   7,   8,   9,   15,  16,  17,  23,  24,
                                25,  31,  32,  33,  47,  48,  49,  63,  64,  65,  79,
                                80,  81,  95,  96,  97,  112, 127, 128, 129, 143, 145,
                                175, 176, 177, 191, 192, 193, 255, 257, 300};
constexpr int64_t kGroups[] = {1, 1, 2, 3, 4, 5, 8, 16, 32, 64};

// The float64 reference takes about 3 ns a multiply-add: 12 ms a case at most.
constexpr double kMostMultiplyAdds = 4e6;

class Generator {
 public:
  Generator(Device device, uint64_t seed) : device_(device), random_(seed) {}

  Case next(int64_t index, bool is_dense) {
    Case c;
    do {
      c = draw();
      if (!is_dense) draw_layout(c, random_);
      draw_quantised(c.problem);
      c.problem.f32_out = index % 8 == 7 && c.problem.dtype_q != Dtype::kF32;
    } while (multiply_adds(c.problem) > kMostMultiplyAdds || !validate(c.problem).ok());
    c.seed = random_();
    c.name = fmt::format("{}: {}", index, describe(c.problem));
    return c;
  }

 private:
  template <typename T, size_t kCount>
  T pick(const T (&list)[kCount]) {
    return list[random_() % kCount];
  }
  bool chance(double probability) {
    return std::uniform_real_distribution<double>(0, 1)(random_) < probability;
  }
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  static double multiply_adds(const Problem& p) {
    return static_cast<double>(p.batch * p.heads_q * (p.dim_qk + p.dim_v)) *
           static_cast<double>(p.len_q * p.len_k);
  }

  void draw_types(Problem& p) {
    // Most CUDA kernels take 16 bits alone.
    constexpr Dtype kCpuTypes[] = {Dtype::kF32, Dtype::kF16, Dtype::kBf16};
    constexpr Dtype kCudaTypes[] = {Dtype::kF32, Dtype::kF16, Dtype::kBf16, Dtype::kF16,
                                    Dtype::kBf16};
    p.dtype_q = device_ == Device::kCpu ? pick(kCpuTypes) : pick(kCudaTypes);
    p.dtype_kv = p.dtype_q;
    // f32 queries over a 16-bit cache, on the CPU alone.
    if (device_ == Device::kCpu && p.dtype_q == Dtype::kF32 && chance(0.3)) {
      p.dtype_kv = chance(0.5) ? Dtype::kF16 : Dtype::kBf16;
    }
  }

  void draw_shape(Problem& p) {
    const Dims dims = pick(kDims);
    p.dim_qk = dims.qk;
    p.dim_v = dims.v;
    p.batch = chance(0.7) ? 1 : between(2, 3);
    p.heads_kv = chance(0.6) ? 1 : between(2, 3);
    p.heads_q = p.heads_kv * pick(kGroups);
    p.len_k = pick(kLengths);
    p.len_q = chance(0.35) ? between(1, 16) : pick(kLengths);
    if (chance(0.02)) p.len_k = 0;
    if (chance(0.01)) p.len_q = 0;
    p.scale = (chance(0.9) ? 1.0f : -0.5f) / std::sqrt(static_cast<float>(p.dim_qk));
  }

  // Whatever the layout is: what a format cannot have, as blocks of odd dims, is drawn again.
  void draw_quantised(Problem& p) {
    // Most CUDA kernels take none.
    if (!chance(device_ == Device::kCpu ? 0.35 : (p.is_dense() ? 0.05 : 0.2))) return;
    constexpr Quantised kFormats[] = {Quantised::kE4m3, Quantised::kInt8, Quantised::kQ8_0,
                                      Quantised::kQ4_0};
    constexpr Scales kKinds[] = {Scales::kNone, Scales::kTensor, Scales::kHead, Scales::kTokenHead,
                                 Scales::kChannel};
    const auto draw = [&](Quantised& format, Scales& scales, Strides& stride, int64_t dim) {
      format = pick(kFormats);
      const bool is_block = format == Quantised::kQ8_0 || format == Quantised::kQ4_0;
      // Codes of int8 alone are of hundreds: scores that float32 does not hold well.
      if (!is_block) scales = format == Quantised::kInt8 ? kKinds[1 + random_() % 4] : pick(kKinds);
      stride = dense_scales_strides(p, scales, dim);
      if (chance(0.2)) stride = {stride[0] * 2, stride[1] * 2, stride[2] * 2, stride[3] * 2};
      if (scales == Scales::kTokenHead) return;
      if (chance(0.2)) stride[0] = 0;
      if (chance(0.1)) stride[1] = 0;
    };
    draw(p.quantised_k, p.scales_k, p.stride_scales_k, p.dim_qk);
    draw(p.quantised_v, p.scales_v, p.stride_scales_v, p.dim_v);
    if (p.values_in_keys || chance(0.5)) {
      p.quantised_v = p.quantised_k;
      p.scales_v = p.scales_k;
      p.stride_scales_v = dense_scales_strides(p, p.scales_v, p.dim_v);
    } else if (chance(0.3)) {  // one of them elements
      p.quantised_v = Quantised::kNone;
      p.scales_v = Scales::kNone;
    }
  }

  void draw_features(Case& c) {
    Problem& p = c.problem;
    constexpr Causal kCausals[] = {Causal::kNone, Causal::kNone, Causal::kBottomRight,
                                   Causal::kBottomRight, Causal::kTopLeft};
    p.causal = pick(kCausals);
    if (chance(0.3)) p.window_left = between(0, p.len_k + 1);
    if (chance(0.2)) p.window_right = between(0, p.len_k + 1);
    if (chance(0.2)) p.softcap = chance(0.5) ? 30.0f : 1.5f;
    if (chance(0.3)) {
      constexpr MaskKind kKinds[] = {MaskKind::kBoolean, MaskKind::kAdditiveF32,
                                     MaskKind::kAdditiveQ};
      p.mask = pick(kKinds);
      constexpr MaskPattern kPatterns[] = {MaskPattern::kRandom, MaskPattern::kWholeRows,
                                           MaskPattern::kAlternatingKeys, MaskPattern::kExtremes};
      c.mask_pattern = pick(kPatterns);
    }
    p.has_sinks = chance(0.2);
    c.has_extreme_sinks = p.has_sinks && chance(0.4);
    p.has_key_lengths = chance(0.25);
    p.has_key_starts = chance(0.15);
    p.wants_log_sum_exp = chance(0.5);
    for (int64_t b = 0; p.has_key_lengths && b < p.batch; ++b) {
      c.key_lengths.push_back(static_cast<int32_t>(between(0, p.len_k)));
    }
    for (int64_t b = 0; p.has_key_starts && b < p.batch; ++b) {
      c.key_starts.push_back(static_cast<int32_t>(between(0, p.len_k + 2)));
    }
    c.has_visible_nan = chance(0.05);
  }

  static Strides strides(Layout layout, int64_t heads, int64_t length, int64_t dim) {
    switch (layout) {
      case Layout::kDense:
      case Layout::kSharedHeads:
        break;
      case Layout::kLengthFirst:
        return {length * heads * dim, dim, heads * dim, 1};
      case Layout::kPadded: {
        const int64_t row = dim + 3;
        return {heads * (length * row + 5), length * row + 5, row, 1};
      }
      case Layout::kPaddedBy16Bytes: {
        const int64_t row = dim + 8;
        return {heads * (length * row + 24), length * row + 24, row, 1};
      }
      case Layout::kDimStrided:
        return {heads * length * dim * 2, length * dim * 2, dim * 2, 2};
    }
    return dense_strides(heads, length, dim);
  }

  void draw_strides(Problem& p) {
    constexpr Layout kLayouts[] = {
        Layout::kDense,           Layout::kDense,       Layout::kLengthFirst, Layout::kPadded,
        Layout::kPaddedBy16Bytes, Layout::kSharedHeads, Layout::kDimStrided};
    const Layout layout = pick(kLayouts);
    p.stride_q = strides(layout, p.heads_q, p.len_q, p.dim_qk);
    p.stride_k = strides(layout, p.heads_kv, p.len_k, p.dim_qk);
    p.stride_v = strides(layout, p.heads_kv, p.len_k, p.dim_v);
    p.stride_out = strides(layout, p.heads_q, p.len_q, p.dim_v);
    if (layout == Layout::kSharedHeads) p.stride_k[1] = p.stride_v[1] = 0;
    if (p.mask != MaskKind::kNone) {
      p.stride_mask = dense_strides(p.heads_q, p.len_q, p.len_k);
      for (int i = 0; i < 3; ++i) {
        if (chance(0.4)) p.stride_mask[i] = 0;
      }
    }
    if (!chance(0.3)) return;
    spoil_unstepped(p.stride_q, {p.batch, p.heads_q, p.len_q, p.dim_qk});
    spoil_unstepped(p.stride_k, {p.batch, p.heads_kv, p.len_k, p.dim_qk});
    spoil_unstepped(p.stride_v, {p.batch, p.heads_kv, p.len_k, p.dim_v});
    spoil_unstepped(p.stride_out, {p.batch, p.heads_q, p.len_q, p.dim_v});
    spoil_unstepped(p.stride_mask, {p.batch, p.heads_q, p.len_q, p.len_k});
  }

  // A dimension of 1 is never stepped over, so its stride may be anything.
  void spoil_unstepped(Strides& strides, const std::array<int64_t, 4>& extents) {
    constexpr int64_t kAnything[] = {0, 3, -1, -64, int64_t{1} << 62};
    for (size_t i = 0; i < 4; ++i) {
      if (extents[i] == 1) strides[i] = pick(kAnything);
    }
  }

  Case draw() {
    Case c;
    c.problem.device = device_;
    draw_types(c.problem);
    draw_shape(c.problem);
    draw_features(c);
    draw_strides(c.problem);
    c.limits.threads = static_cast<int32_t>(between(1, 3));
    c.limits.precision = chance(0.2) ? Precision::kHigh : Precision::kNative;
    c.limits.batch_invariant = chance(0.2);
    return c;
  }

  Device device_;
  std::mt19937_64 random_;
};

Problem dense(Device device, Dtype dtype, int64_t heads_q, int64_t heads_kv, int64_t len_q,
              int64_t len_k, int64_t dim) {
  Problem p;
  p.device = device;
  p.dtype_q = p.dtype_kv = dtype;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.len_q = len_q;
  p.len_k = len_k;
  p.dim_qk = p.dim_v = dim;
  set_dense(p);
  return p;
}

std::vector<Case> corner_cases(Device device) {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, const Problem& problem) -> Case& {
    Case& c = cases.emplace_back();
    c.name = name;
    c.problem = problem;
    c.seed = cases.size();
    return c;
  };
  for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
    // ggml's f16 accumulator is off by 32-46 % here.
    add("V of mean 1 over 32768 keys", dense(device, dtype, 2, 1, 1, 32768, 64)).mean_v = 1;
    add("V of mean 1, prefill", dense(device, dtype, 1, 1, 32, 32768, 64)).mean_v = 1;
    Problem p = dense(device, dtype, 2, 1, 70, 20, 64);
    p.causal = Causal::kBottomRight;
    p.wants_log_sum_exp = true;
    add("more queries than keys: the first rows see nothing", p);
    p = dense(device, dtype, 16, 1, 4, 9000, 128);
    p.window_left = 100;
    p.causal = Causal::kBottomRight;
    add("a short window at the end of a long cache", p);
    p = dense(device, dtype, 4, 2, 33, 2500, 64);
    p.causal = Causal::kTopLeft;
    add("top-left: most keys are never seen", p);
    p = dense(device, dtype, 2, 2, 3, 3000, 40);
    p.batch = 2;
    p.stride_q = p.stride_out = dense_strides(2, 3, 40);
    p.stride_k = p.stride_v = dense_strides(2, 3000, 40);
    p.has_key_lengths = p.has_key_starts = p.wants_log_sum_exp = true;
    Case& c = add("an empty cache beside a full one", p);
    c.key_lengths = {0, 3000};
    c.key_starts = {0, 2999};
    p = dense(device, dtype, 8, 1, 20, 5000, 64);
    p.mask = MaskKind::kBoolean;
    p.stride_mask = {0, 0, 0, 1};
    add("one mask row for all, over several chunks", p).mask_pattern =
        MaskPattern::kAlternatingKeys;
    p = dense(device, dtype, 16, 1, 3, 700, 576);
    p.dim_v = 512;
    p.stride_v = p.stride_k;
    p.stride_out = dense_strides(16, 3, 512);
    p.causal = Causal::kBottomRight;
    p.values_in_keys = true;
    add("V is in K, latent attention", p);
    // Tiles, chunks and splits of keys that meet at biases and sinks of every size.
    for (const MaskKind mask : {MaskKind::kAdditiveF32, MaskKind::kAdditiveQ}) {
      const char* type = mask == MaskKind::kAdditiveF32 ? "f32" : "q's type";
      for (const int64_t len_q : {int64_t{2}, int64_t{96}}) {
        p = dense(device, dtype, 4, 2, len_q, len_q < 64 ? 9000 : 700, 64);
        p.mask = mask;
        p.stride_mask = {0, 0, p.len_k, 1};
        p.has_sinks = p.wants_log_sum_exp = true;
        Case& extreme =
            add(fmt::format("biases of every size, {} rows, mask of {}", len_q, type), p);
        extreme.mask_pattern = MaskPattern::kExtremes;
        extreme.has_extreme_sinks = true;
      }
    }
  }
  // Beyond f16, whichever type the products are of. In the second scale the smallest queries tell
  // keys apart.
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    for (const int64_t dim : {int64_t{64}, int64_t{128}, int64_t{256}}) {
      for (const float scale : {1.0f, 0x1p40f}) {
        Problem p = dense(device, dtype, 6, 2, 70, 300, dim);
        p.scale = scale / std::sqrt(static_cast<float>(dim));
        p.quantised_k = Quantised::kE4m3;
        p.quantised_v = Quantised::kInt8;
        p.scales_k = Scales::kHead;
        p.scales_v = dim == 128 ? Scales::kTokenHead : Scales::kTensor;
        p.wants_log_sum_exp = true;
        set_dense(p);
        add(fmt::format("queries of every size over codes, dim {}, scale {}", dim, scale), p)
            .has_extreme_queries = true;
      }
    }
  }
  // Refused by every CUDA kernel, and taken by the CPU's.
  Problem mixed = dense(device, Dtype::kF32, 4, 2, 40, 200, 64);
  mixed.dtype_kv = Dtype::kF16;
  add("f32 queries over f16 keys", mixed);
  return cases;
}

}  // namespace

std::vector<Case> make_cases(CaseSet set, Device device, uint64_t seed) {
  if (set == CaseSet::kCorner) return corner_cases(device);
  if (set == CaseSet::kRagged) return make_ragged_cases(device, seed);
  if (set == CaseSet::kLarge) return make_large_cases(device, seed, 1);
  Generator generator(device, seed);
  std::vector<Case> cases;
  const auto add = [&](int64_t count, bool is_dense) {
    for (int64_t i = 0; i < count; ++i) cases.push_back(generator.next(i, is_dense));
  };
  if (set == CaseSet::kLayouts) {
    add(3200, false);
    return cases;
  }
  add(set == CaseSet::kSmoke ? 200 : (set == CaseSet::kCi ? 3400 : 30000), true);
  return cases;
}

}  // namespace wh
