#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>

#include <cstring>

#include "attention.h"

namespace widehead_mlx {
namespace {

const void* host_memory(const mx::array& a) { return a.data<void>(); }

// Widehead takes no negative strides, and whether a view is reversed shows only here: a copy.
class Dense {
 public:
  Dense(const mx::array& a, const widehead::TensorView& view) : view_(view) {
    if (!is_reversed(a)) return;
    const auto& shape = view.shape;
    const size_t bytes = a.itemsize();
    memory_.resize(a.nbytes());
    char* to = memory_.data();
    const auto* from = static_cast<const char*>(view.data);
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t i = 0; i < shape[2]; ++i) {
          for (int64_t d = 0; d < shape[3]; ++d, to += bytes) {
            const int64_t at = b * view.strides[0] + h * view.strides[1] + i * view.strides[2] +
                               d * view.strides[3];
            std::memcpy(to, from + at * static_cast<int64_t>(bytes), bytes);
          }
        }
      }
    }
    view_ = {memory_.data(), view.dtype, shape};
  }

  const widehead::TensorView& view() const { return view_; }

 private:
  widehead::TensorView view_;
  std::vector<char> memory_;
};

void run(const Call& call, const std::vector<mx::array>& outputs) {
  const auto view = [&](const mx::array& a) { return call.view(a, host_memory); };
  const Dense q(call.inputs[0], view(call.inputs[0]));
  const Dense k(call.inputs[1], view(call.inputs[1]));
  const Dense v(call.inputs[2], view(call.inputs[2]));
  widehead::Options options = call.widehead_options(host_memory);
  if (outputs.size() > 1) options.log_sum_exp = const_cast<float*>(outputs[1].data<float>());
  widehead::attention(q.view(), k.view(), v.view(), view(outputs[0]), options, call.options.limits);
}

void run_backward(const Call& call, const std::vector<mx::array>& outputs) {
  BackwardTensors t = call.backward_tensors(outputs, host_memory);
  const Dense q(call.inputs[0], t.q), k(call.inputs[1], t.k), v(call.inputs[2], t.v);
  const Dense d_out(call.inputs.back(), t.gradients.d_out);
  t.gradients.d_out = d_out.view();
  widehead::backward(q.view(), k.view(), v.view(), t.out, t.gradients, t.options,
                     call.options.limits);
}

std::vector<mx::array> weak_copies(const std::vector<mx::array>& arrays) {
  std::vector<mx::array> copies;
  for (const mx::array& each : arrays) copies.push_back(mx::array::unsafe_weak_copy(each));
  return copies;
}

// Puts `run` on the stream. MLX keeps inputs and outputs alive until it is done; copies that count
// would keep it from reusing their memory.
void dispatch(void (*run)(const Call&, const std::vector<mx::array>&), Call call,
              std::vector<mx::array>& outputs) {
  auto& encoder = mx::cpu::get_command_encoder(call.stream);
  for (const mx::array& each : call.inputs) encoder.set_input_array(each);
  call.inputs = weak_copies(call.inputs);
  for (mx::array& each : outputs) {
    each.set_data(mx::allocator::malloc(each.nbytes()), each.size(), output_strides(each),
                  output_flags(each));
    encoder.set_output_array(each);
  }
  // Strides are final only when the task runs.
  encoder.dispatch(
      [run, call = std::move(call), outputs = weak_copies(outputs)] { run(call, outputs); });
}

}  // namespace

void Attention::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  dispatch(run, {stream(), options_, present_, inputs}, outputs);
}

void AttentionGradients::eval_cpu(const std::vector<mx::array>& inputs,
                                  std::vector<mx::array>& outputs) {
  dispatch(run_backward, {stream(), options_, present_, inputs}, outputs);
}

}  // namespace widehead_mlx
