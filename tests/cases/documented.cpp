#include "documented.h"

namespace wh {
namespace {

// 16-bit elements: strides of 16 bytes are 8 of them. A dimension of one is never stepped over.
bool has_steps_of(const Strides& stride, int64_t heads, const Storage& stored, int64_t multiple) {
  return stride[3] == 1 && (stored.batch <= 1 || stride[0] % multiple == 0) &&
         (heads <= 1 || stride[1] % multiple == 0) &&
         (stored.length <= 1 || stride[2] % multiple == 0);
}

}  // namespace

bool Documented::is_for_tma() const {
  const Problem& p = problem;
  if (p.key_layout == KeyLayout::kPaged && p.page_size % 8 != 0) return false;
  const Storage queries = query_storage(p), keys = key_storage(p);
  return p.dim_qk % 8 == 0 && p.dim_v % 8 == 0 && has_steps_of(p.stride_q, p.heads_q, queries, 8) &&
         has_steps_of(p.stride_k, p.heads_kv, keys, 8) &&
         has_steps_of(p.stride_v, p.heads_kv, keys, 8) &&
         has_steps_of(p.stride_out, p.heads_q, queries, 4);
}
bool Documented::has_gradients_for_tma() const {
  const Problem& p = problem;
  const Storage queries = query_storage(p), keys = key_storage(p);
  return has_steps_of(p.stride_d_out, p.heads_q, queries, 8) &&
         has_steps_of(p.stride_dq, p.heads_q, queries, 4) &&
         has_steps_of(p.stride_dk, p.heads_kv, keys, 4) &&
         has_steps_of(p.stride_dv, p.heads_kv, keys, 4);
}

bool Documented::is_sm90(int64_t most_dim_qk, int64_t most_dim_v) const {
  const bool is_16_bit = problem.dtype_q == Dtype::kF16 || problem.dtype_q == Dtype::kBf16;
  return cuda().compute_capability == 90 && (is_one_type() || is_quantised(problem)) && is_16_bit &&
         precision == Precision::kNative && problem.dim_qk <= most_dim_qk &&
         problem.dim_v <= most_dim_v && is_for_tma();
}

// In f32 to 256/256, on tensor cores, where q has 16 bits and both K and V are codes, to 576/512:
// there q in several parts leaves too little of 99 KB.
bool Documented::portable_reads_codes() const {
  const Problem& p = problem;
  if (p.dim_qk <= 256 && p.dim_v <= 256) return true;
  if (p.dtype_q == Dtype::kF32 || precision != Precision::kNative) return false;
  if (p.quantised_k == Quantised::kNone) return false;
  if (p.quantised_v == Quantised::kNone && !p.values_in_keys) return false;
  const bool has_parts = p.dtype_q == Dtype::kF16 || p.scales_k == Scales::kChannel;
  if (has_parts && cuda().shared_bytes < 166912) return false;
  return p.dim_qk <= 576 && p.dim_v <= 512;
}

// 8 bits each, in rows, heads and sequences that begin at multiples of 16; K's scales none of
// channels, and V's in f16 none of tokens.
bool Documented::sm90_reads_codes() const {
  const Problem p = canonical(problem);
  const auto is_byte = [](Quantised format) {
    return format == Quantised::kE4m3 || format == Quantised::kInt8;
  };
  const auto is_whole = [](const Strides& stride) {
    return stride[0] % 16 == 0 && stride[1] % 16 == 0 && stride[2] % 16 == 0;
  };
  return is_byte(p.quantised_k) && is_byte(p.quantised_v) && !p.values_in_keys &&
         p.scales_k != Scales::kChannel &&
         !(p.dtype_q == Dtype::kF16 && p.scales_v == Scales::kTokenHead) && is_whole(p.stride_k) &&
         is_whole(p.stride_v);
}

bool Documented::takes(const std::string& kernel) const {
  const Problem& p = problem;
  const bool is_cpu = p.device == Device::kCpu;
  const bool is_dense_alone = kernel == "cpu_unfused" || kernel == "cuda_unfused";
  if (is_dense_alone && !p.is_dense()) return false;
  const bool reads_codes =
      kernel == "cpu_prefill" || kernel == "cpu_decode" || kernel == "cpu_reference" ||
      (kernel == "cuda_portable" && portable_reads_codes()) ||
      ((kernel == "sm90_decode" || kernel == "sm90_prefill" || kernel == "sm90_prefill_wide") &&
       sm90_reads_codes());
  if (is_quantised(p) && !reads_codes) return false;
  if (kernel == "cpu_prefill" || kernel == "cpu_unfused" || kernel == "cpu_reference") {
    return is_cpu;
  }
  if (kernel == "cpu_backward" || kernel == "cpu_reference_backward") return is_cpu;
  if (kernel == "cpu_decode") return is_cpu && p.len_q * p.group() <= 128;
  if (kernel == "cpu_prefill_bf16") {
    return is_cpu && is_one_type() && p.dtype_q == Dtype::kBf16 && cpu().has_avx512_bf16;
  }
  if (is_cpu) return false;
  const bool writes_type_of_q = p.dtype_out() == p.dtype_q;
  if (!writes_type_of_q && kernel != "sm90_decode" && kernel != "cuda_portable") return false;
  const bool is_sm90_prefill = kernel == "sm90_prefill" || kernel == "sm90_prefill_wide";
  if (is_sm90_prefill && !p.is_dense() && p.mask != MaskKind::kNone) return false;
  // Nor over codes where heads are wide.
  if (kernel == "sm90_prefill_wide" && is_quantised(p) && p.mask != MaskKind::kNone) return false;
  if (kernel == "sm90_prefill") return is_sm90(is_quantised(p) ? 256 : 320, 256);
  if ((kernel == "sm90_prefill_wide" || kernel == "sm90_decode") && is_quantised(p)) {
    return is_sm90(512, 512);
  }
  if (kernel == "sm90_prefill_wide" || kernel == "sm90_decode") return is_sm90(576, 512);
  if (kernel == "sm90_backward" || kernel == "sm90_backward_wide") {
    const int64_t widest = kernel == "sm90_backward" ? 256 : 512;
    return is_sm90(widest, widest) && p.mask == MaskKind::kNone && !p.values_in_keys &&
           has_gradients_for_tma();
  }
  if (cuda().compute_capability < 80) return false;
  if (kernel == "cuda_portable_backward") {
    // f32 wider than 256 has a tile of 163 KB alone.
    const bool is_wide = p.dim_qk > 256 || p.dim_v > 256;
    const bool is_f32 = p.dtype_q == Dtype::kF32;
    return is_one_type() && p.dim_qk <= 512 && p.dim_v <= 512 &&
           (is_f32 || precision == Precision::kNative) &&
           !(is_f32 && is_wide && cuda().shared_bytes < 166912);
  }
  if (is_quantised(p)) return true;
  if (!is_one_type()) return false;
  if (kernel == "cuda_portable") return precision == Precision::kNative || p.dtype_q == Dtype::kF32;
  return kernel == "cuda_unfused";
}

}  // namespace wh
