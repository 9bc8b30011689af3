#include "attention.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace widehead_mlx {
namespace {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

void check_shapes(const mx::array& q, const mx::array& k, const mx::array& v) {
  const auto rank = [](const char* name, const mx::array& a) {
    if (a.ndim() != 4) fail(name, " is ", a.shape(), "; it must have 4 dimensions");
  };
  rank("q", q);
  rank("k", k);
  rank("v", v);
  if (k.shape(0) != q.shape(0) || k.shape(3) != q.shape(3)) {
    fail("k is ", k.shape(), "; it must have q's batch and last dimension, and q is ", q.shape());
  }
  if (v.shape(0) != k.shape(0) || v.shape(1) != k.shape(1) || v.shape(2) != k.shape(2)) {
    fail("v is ", v.shape(), "; it must have k's batch, heads and length, and k is ", k.shape());
  }
  if (k.shape(1) < 1 || q.shape(1) < 1 || q.shape(1) % k.shape(1) != 0) {
    fail("q has ", q.shape(1), " heads and k ", k.shape(1),
         "; q's must be a multiple of k's, and both at least 1");
  }
  for (const int dim : {q.shape(3), v.shape(3)}) {
    if (dim < 1 || dim > 1024) fail("a head has ", dim, " dimensions; valid: 1 to 1024");
  }
}

void check_mask_shape(const mx::array& mask, const mx::array& q, const mx::array& k) {
  const mx::Shape full{q.shape(0), q.shape(1), q.shape(2), k.shape(2)};
  bool fits = mask.ndim() >= 1 && mask.ndim() <= 4;
  for (int i = 1; fits && i <= static_cast<int>(mask.ndim()); ++i) {
    fits = mask.shape(-i) == 1 || mask.shape(-i) == full[4 - i];
  }
  if (!fits) {
    fail("mask is ", mask.shape(), "; it must broadcast to [batch, heads_q, len_q, len_k], here ",
         full);
  }
}

// Of the inputs of Attention. What is compiled for any shape sees others later.
void check_input_shapes(const std::vector<mx::array>& inputs, Present present) {
  const mx::array &q = inputs[0], &k = inputs[1];
  check_shapes(q, k, inputs[2]);
  const auto check_numbers = [](const char* name, const mx::array& a, const char* want, int count) {
    if (a.ndim() != 1 || a.shape(0) != count) {
      fail(name, " is ", a.shape(), "; it must be [", want, "], here [", count, "]");
    }
  };
  size_t next = 3;
  if (present.mask) check_mask_shape(inputs[next++], q, k);
  if (present.sinks) check_numbers("sinks", inputs[next++], "heads_q", q.shape(1));
  if (present.key_starts) check_numbers("key_starts", inputs[next++], "batch", q.shape(0));
}

}  // namespace

mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v,
                    const Options& options, const Extras& extras, mx::StreamOrDevice stream) {
  const mx::Dtype type = mx::result_type({q, k, v});
  if (type != mx::float32 && type != mx::float16 && type != mx::bfloat16) {
    fail("q, k and v promote to ", type, "; it must be float32, float16 or bfloat16");
  }
  std::vector<mx::array> inputs;
  for (const mx::array& each : {q, k, v}) inputs.push_back(mx::astype(each, type, stream));
  if (extras.mask) {
    const bool is_boolean = extras.mask->dtype() == mx::bool_;
    if (!is_boolean && mx::promote_types(extras.mask->dtype(), type) != type) {
      fail("mask is ", extras.mask->dtype(), "; it must be bool or promote to ", type);
    }
    inputs.push_back(is_boolean ? *extras.mask : mx::astype(*extras.mask, type, stream));
  }
  if (extras.sinks) {
    if (mx::promote_types(extras.sinks->dtype(), type) != type) {
      fail("sinks is ", extras.sinks->dtype(), "; it must promote to ", type);
    }
    const mx::array sinks = mx::astype(*extras.sinks, mx::float32, stream);
    inputs.push_back(mx::contiguous(sinks, false, stream));
  }
  if (extras.key_starts) {
    // A cache of many sequences counts below 0 what it has dropped.
    const mx::array starts = mx::maximum(*extras.key_starts, mx::array(0), stream);
    inputs.push_back(mx::contiguous(mx::astype(starts, mx::int32, stream), false, stream));
  }
  const Present present{extras.mask.has_value(), extras.sinks.has_value(),
                        extras.key_starts.has_value()};
  const mx::Stream chosen = mx::to_stream(stream);
  // Whoever may be differentiated is a tracer. mx.compile and mx.vmap have them too: a log-sum-exp
  // that nobody reads is 4 bytes a row of q, freed at once.
  const bool has_log_sum_exp =
      std::any_of(inputs.begin(), inputs.end(), [](const mx::array& a) { return a.is_tracer(); });
  auto attention = std::make_shared<Attention>(chosen, options, present, has_log_sum_exp);
  std::vector<mx::Dtype> types{type};
  if (has_log_sum_exp) types.push_back(mx::float32);
  return mx::array::make_arrays(attention->output_shapes(inputs), types, attention, inputs)[0];
}

bool Attention::is_equivalent(const mx::Primitive& other) const {
  return Composed::is_equivalent(other) &&
         has_log_sum_exp_ == static_cast<const Attention&>(other).has_log_sum_exp_;
}

std::vector<mx::Shape> Attention::output_shapes(const std::vector<mx::array>& inputs) {
  check_input_shapes(inputs, present_);
  const mx::Shape& q = inputs[0].shape();
  std::vector<mx::Shape> shapes{{q[0], q[1], q[2], inputs[2].shape(3)}};
  if (has_log_sum_exp_) shapes.push_back({q[0], q[1], q[2]});
  return shapes;
}

// The formula in MLX's operations, its masking by the type's lowest number included.
std::vector<mx::array> Attention::formula(const std::vector<mx::array>& inputs) {
  const mx::Stream s = stream();
  const mx::array &q = inputs[0], &k = inputs[1], &v = inputs[2];
  const int batch = q.shape(0), heads = q.shape(1), len_q = q.shape(2);
  const int heads_kv = k.shape(1), len_k = k.shape(2), group = heads / heads_kv;
  const auto per_kv_head = [&](const mx::array& a) { return mx::expand_dims(a, 2, s); };
  mx::array scores = mx::reshape(q, {batch, heads_kv, group, len_q, q.shape(3)}, s);
  scores = mx::matmul(mx::multiply(scores, mx::array(options_.scale, q.dtype()), s),
                      per_kv_head(mx::swapaxes(k, -1, -2, s)), s);
  scores = mx::reshape(scores, {batch, heads, len_q, len_k}, s);
  if (options_.softcap != 0) {
    const mx::array cap(options_.softcap, q.dtype());
    scores = mx::multiply(mx::tanh(mx::divide(scores, cap, s), s), cap, s);
  }
  const auto hide = [&](const mx::array& visible) {
    const mx::array lowest(mx::finfo(scores.dtype()).min, scores.dtype());
    scores = mx::where(visible, scores, lowest, s);
  };
  const mx::array keys = mx::arange(len_k, s);
  const mx::array diagonal = mx::expand_dims(mx::arange(len_k - len_q, len_k, s), 1, s);
  if (options_.causal) hide(mx::less_equal(keys, diagonal, s));
  if (options_.window_left != WH_UNLIMITED) {
    const mx::array left(static_cast<int>(options_.window_left));
    hide(mx::greater_equal(keys, mx::subtract(diagonal, left, s), s));
  }
  size_t next = 3;
  if (present_.mask) {
    const mx::array& mask = inputs[next++];
    if (mask.dtype() == mx::bool_) {
      hide(mask);
    } else {
      scores = mx::add(scores, mask, s);
    }
  }
  const int sink_columns = present_.sinks ? 1 : 0;
  if (present_.sinks) {
    const mx::array sinks = mx::astype(inputs[next++], scores.dtype(), s);
    const mx::array column =
        mx::broadcast_to(mx::reshape(sinks, {1, heads, 1, 1}, s), {batch, heads, len_q, 1}, s);
    scores = mx::concatenate({column, scores}, -1, s);
  }
  if (present_.key_starts) {
    const mx::array starts = mx::reshape(inputs[next++], {batch, 1, 1, 1}, s);
    const mx::array columns = mx::arange(-sink_columns, len_k, s);
    const mx::array is_sink = mx::less(columns, mx::array(0), s);
    hide(mx::logical_or(is_sink, mx::greater_equal(columns, starts, s), s));
  }
  const mx::array log_sum_exp = mx::logsumexp(mx::astype(scores, mx::float32, s), -1, false, s);
  mx::array weights = mx::softmax(scores, std::vector<int>{-1}, true, s);
  weights =
      mx::slice(weights, {0, 0, 0, sink_columns}, {batch, heads, len_q, len_k + sink_columns}, s);
  weights = mx::reshape(weights, {batch, heads_kv, group, len_q, len_k}, s);
  const mx::array out =
      mx::reshape(mx::matmul(weights, per_kv_head(v), s), {batch, heads, len_q, v.shape(3)}, s);
  if (has_log_sum_exp_) return {out, log_sum_exp};
  return {out};
}

std::vector<mx::array> Attention::vjp(const std::vector<mx::array>& primals,
                                      const std::vector<mx::array>& cotangents,
                                      const std::vector<int>& argnums,
                                      const std::vector<mx::array>& outputs) {
  const auto is_additive_mask = [&](int i) {
    return i == 3 && present_.mask && primals[3].dtype() != mx::bool_;
  };
  if (!has_log_sum_exp_ || std::any_of(argnums.begin(), argnums.end(), is_additive_mask)) {
    return Composed::vjp(primals, cotangents, argnums, outputs);
  }
  const std::vector<mx::array> gradients =
      gradients_of(stream(), options_, present_, primals, outputs, cotangents[0]);
  if (gradients.empty()) return Composed::vjp(primals, cotangents, argnums, outputs);
  std::vector<mx::array> asked;
  for (const int i : argnums) {
    const bool is_sinks = present_.sinks && i == present_.sinks_input();
    asked.push_back(i < 3      ? gradients[i]
                    : is_sinks ? gradients[3]
                               : mx::zeros_like(primals[i], stream()));
  }
  return asked;
}

Composed::Differentiable Composed::of_asked(const std::vector<mx::array>& primals,
                                            const std::vector<int>& argnums) {
  std::vector<mx::array> asked;
  for (const int i : argnums) asked.push_back(primals[i]);
  const auto function = [this, primals, argnums](const std::vector<mx::array>& values) {
    std::vector<mx::array> inputs = primals;
    for (size_t i = 0; i < argnums.size(); ++i) inputs[argnums[i]] = values[i];
    return formula(inputs);
  };
  return {function, asked};
}

std::vector<mx::array> Composed::vjp(const std::vector<mx::array>& primals,
                                     const std::vector<mx::array>& cotangents,
                                     const std::vector<int>& argnums,
                                     const std::vector<mx::array>&) {
  const auto [function, asked] = of_asked(primals, argnums);
  return mx::vjp(function, asked, cotangents).second;
}

std::vector<mx::array> Composed::jvp(const std::vector<mx::array>& primals,
                                     const std::vector<mx::array>& tangents,
                                     const std::vector<int>& argnums) {
  const auto [function, asked] = of_asked(primals, argnums);
  return mx::jvp(function, asked, tangents).second;
}

std::pair<std::vector<mx::array>, std::vector<int>> Composed::vmap(
    const std::vector<mx::array>& inputs, const std::vector<int>& axes) {
  const auto function = [this](const std::vector<mx::array>& values) { return formula(values); };
  const std::vector<mx::array> outputs = mx::vmap(function, axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

bool Composed::is_equivalent(const mx::Primitive& other) const {
  const auto& same = static_cast<const Composed&>(other);
  return options_ == same.options_ && present_ == same.present_;
}

widehead::Dtype dtype_of(const mx::array& a) {
  if (a.dtype() == mx::float16) return widehead::Dtype::kF16;
  return a.dtype() == mx::bfloat16 ? widehead::Dtype::kBf16 : widehead::Dtype::kF32;
}

widehead::Extents extents_of(const mx::array& a) {
  return {a.shape(0), a.shape(1), a.shape(2), a.shape(3)};
}

widehead::Extents strides_of(const mx::array& a) {
  const mx::Strides& strides = a.strides();
  return {strides[0], strides[1], strides[2], strides[3]};
}

widehead::Extents mask_strides_of(const mx::array& mask) {
  widehead::Extents strides{0, 0, 0, 0};
  const size_t missing = 4 - mask.ndim();
  for (size_t i = 0; i < mask.ndim(); ++i) {
    if (mask.shape(i) != 1) strides[missing + i] = mask.strides()[i];
  }
  return strides;
}

bool is_reversed(const mx::array& a) {
  for (size_t i = 0; i < a.ndim(); ++i) {
    if (a.shape(i) > 1 && a.strides()[i] < 0) return true;
  }
  return false;
}

mx::Strides output_strides(const mx::array& out) {
  if (out.ndim() != 4) return out.strides();  // of a new array: contiguous
  const int64_t heads = out.shape(1), length = out.shape(2), dim = out.shape(3);
  if (output_flags(out).row_contiguous) return {heads * length * dim, length * dim, dim, 1};
  return {heads * length * dim, dim, heads * dim, 1};
}

mx::array::Flags output_flags(const mx::array& out) {
  mx::array::Flags flags;
  flags.contiguous = true;
  flags.row_contiguous = out.ndim() != 4 || out.shape(1) == 1 || out.shape(2) == 1;
  flags.col_contiguous = out.size() <= 1;
  return flags;
}

void adopt(mx::array& out, const mx::array& memory) {
  out.copy_shared_buffer(memory, output_strides(out), output_flags(out), out.size());
}

}  // namespace widehead_mlx
