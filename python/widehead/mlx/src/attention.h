// Attention as a primitive of MLX: lazy, on MLX's streams, on the arrays' own memory.
#pragma once

#include <mlx/mlx.h>
#include <mlx/primitives.h>

#include <functional>
#include <optional>
#include <vector>
#include <widehead/widehead.hpp>

namespace widehead_mlx {

namespace mx = mlx::core;

// What a call computes beyond softmax(scale * q k^T) v, and what it may take.
struct Options {
  float scale = 1;
  float softcap = 0;
  bool causal = false;  // aligned bottom-right, as MLX's
  int64_t window_left = WH_UNLIMITED;
  widehead::Limits limits{};

  bool operator==(const Options&) const = default;
};

// The arrays that a call may have beside q, k and v.
struct Extras {
  std::optional<mx::array> mask;        // rank 1 to 4, broadcasts to [batch, heads_q, len_q, len_k]
  std::optional<mx::array> sinks;       // [heads_q]
  std::optional<mx::array> key_starts;  // int32 [batch]
};

// Builds the node. Throws std::invalid_argument in the words of its argument, value and range.
mx::array attention(const mx::array& q, const mx::array& k, const mx::array& v,
                    const Options& options, const Extras& extras, mx::StreamOrDevice stream);

// Which extras follow q, k and v among the inputs, in this order.
struct Present {
  bool mask, sinks, key_starts;
  int sinks_input() const { return mask ? 4 : 3; }
  bool operator==(const Present&) const = default;
};

// A primitive of q, k, v and the extras that has a formula in MLX's operations, which stores the
// scores. Its transformations are those of the formula: Widehead has no forward-mode and no second
// derivatives, and a mapped axis is no batch of Widehead's.
class Composed : public mx::Primitive {
 public:
  Composed(mx::Stream stream, const Options& options, Present present)
      : mx::Primitive(stream), options_(options), present_(present) {}

  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums,
                             const std::vector<mx::array>& outputs) override;
  std::vector<mx::array> jvp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& tangents,
                             const std::vector<int>& argnums) override;
  std::pair<std::vector<mx::array>, std::vector<int>> vmap(const std::vector<mx::array>& inputs,
                                                           const std::vector<int>& axes) override;
  bool is_equivalent(const mx::Primitive& other) const override;

 protected:
  virtual std::vector<mx::array> formula(const std::vector<mx::array>& inputs) = 0;

  Options options_;
  Present present_;

 private:
  // The formula of the arguments that a transformation asks for, and those: whole numbers have no
  // gradient.
  struct Differentiable {
    std::function<std::vector<mx::array>(const std::vector<mx::array>&)> function;
    std::vector<mx::array> asked;
  };
  Differentiable of_asked(const std::vector<mx::array>& primals, const std::vector<int>& argnums);
};

// Its outputs are out and, where somebody may ask for gradients, the log-sum-exp that they need.
class Attention : public Composed {
 public:
  Attention(mx::Stream stream, const Options& options, Present present, bool has_log_sum_exp)
      : Composed(stream, options, present), has_log_sum_exp_(has_log_sum_exp) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  // By AttentionGradients where that serves.
  std::vector<mx::array> vjp(const std::vector<mx::array>& primals,
                             const std::vector<mx::array>& cotangents,
                             const std::vector<int>& argnums,
                             const std::vector<mx::array>& outputs) override;

  const char* name() const override { return "WideheadAttention"; }
  bool is_equivalent(const mx::Primitive& other) const override;
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  std::vector<mx::array> formula(const std::vector<mx::array>& inputs) override;

  bool has_log_sum_exp_;
};

// The gradients of q, k, v and, where they are present, the sinks. Its inputs are those of
// Attention, and then out, the log-sum-exp and the gradient of out.
class AttentionGradients : public Composed {
 public:
  using Composed::Composed;

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;
  void eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override;

  const char* name() const override { return "WideheadAttentionGradients"; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override;

 private:
  std::vector<mx::array> formula(const std::vector<mx::array>& inputs) override;
};

inline bool is_gpu(mx::Stream stream) { return stream.device.type == mx::Device::gpu; }

// The outputs of AttentionGradients, from the inputs and outputs of Attention. None where the
// device has no kernel for them (GPUs: heads of more than 512 dimensions), and the formula serves.
// Throws widehead::Error where the limits allow none of those that there are.
std::vector<mx::array> gradients_of(mx::Stream stream, const Options& options, Present present,
                                    const std::vector<mx::array>& inputs,
                                    const std::vector<mx::array>& outputs, const mx::array& d_out);

// What a run of the backward pass reads and writes.
struct BackwardTensors {
  widehead::TensorView q, k, v, out;
  widehead::Gradients gradients;
  widehead::Options options;
};

// The inputs of an evaluation as Widehead takes them. Memory is where `Pointer` says.
struct Call {
  mx::Stream stream;
  Options options;
  Present present;
  std::vector<mx::array> inputs;

  template <typename Pointer>
  widehead::TensorView view(const mx::array& a, Pointer pointer) const;
  template <typename Pointer>
  widehead::Options widehead_options(Pointer pointer) const;
  // Of AttentionGradients.
  template <typename Pointer>
  BackwardTensors backward_tensors(const std::vector<mx::array>& outputs, Pointer pointer) const;
};

widehead::Dtype dtype_of(const mx::array& a);
widehead::Extents extents_of(const mx::array& a);
widehead::Extents strides_of(const mx::array& a);
// Of a mask over [batch, heads_q, len_q, len_k]; 0 where it broadcasts.
widehead::Extents mask_strides_of(const mx::array& mask);
bool is_reversed(const mx::array& a);  // has a negative stride

// Gives an output memory. Where it has heads, those of a position lie side by side: what models do
// next, a transposition and a reshape, is then a view.
void adopt(mx::array& out, const mx::array& memory);
mx::Strides output_strides(const mx::array& out);
mx::array::Flags output_flags(const mx::array& out);

template <typename Pointer>
widehead::TensorView Call::view(const mx::array& a, Pointer pointer) const {
  return {pointer(a), dtype_of(a), extents_of(a), strides_of(a)};
}

template <typename Pointer>
widehead::Options Call::widehead_options(Pointer pointer) const {
  widehead::Options made;
  if (is_gpu(stream)) {
    made.device = widehead::Device::kCuda;
    made.device_index = stream.device.index;
  }
  made.scale = options.scale;
  made.softcap = options.softcap;
  made.causal = options.causal ? widehead::Causal::kBottomRight : widehead::Causal::kNone;
  made.window_left = options.window_left;
  size_t next = 3;
  if (present.mask) {
    const mx::array& mask = inputs[next++];
    made.mask = {
        pointer(mask),
        mask.dtype() == mx::bool_ ? widehead::MaskKind::kBoolean : widehead::MaskKind::kAdditive,
        mask_strides_of(mask)};
  }
  if (present.sinks) made.sinks = static_cast<const float*>(pointer(inputs[next++]));
  if (present.key_starts) made.key_starts = static_cast<const int32_t*>(pointer(inputs[next++]));
  return made;
}

template <typename Pointer>
BackwardTensors Call::backward_tensors(const std::vector<mx::array>& outputs,
                                       Pointer pointer) const {
  const auto of = [&](const mx::array& a) { return view(a, pointer); };
  const auto numbers = [&](const mx::array& a) {
    return static_cast<float*>(const_cast<void*>(pointer(a)));
  };
  const size_t last = inputs.size() - 1;
  BackwardTensors made{of(inputs[0]),
                       of(inputs[1]),
                       of(inputs[2]),
                       of(inputs[last - 2]),
                       {of(inputs[last]), of(outputs[0]), of(outputs[1]), of(outputs[2])},
                       widehead_options(pointer)};
  made.options.log_sum_exp = numbers(inputs[last - 1]);
  if (present.sinks) made.gradients.d_sinks = numbers(outputs[3]);
  return made;
}

}  // namespace widehead_mlx
