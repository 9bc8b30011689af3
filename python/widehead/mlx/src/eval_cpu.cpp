#include <mlx/allocator.h>
#include <mlx/backend/cpu/encoder.h>

#include <cstring>

#include "attention.h"

namespace widehead_mlx {
namespace {

const void* host_memory(const mx::array& a) { return a.data<void>(); }

void copy_elements(const mx::array& from, int axis, const char* at, char*& to) {
  if (axis == static_cast<int>(from.ndim())) {
    std::memcpy(to, at, from.itemsize());
    to += from.itemsize();
    return;
  }
  const int64_t step = from.strides()[axis] * static_cast<int64_t>(from.itemsize());
  for (int i = 0; i < from.shape(axis); ++i, at += step) copy_elements(from, axis + 1, at, to);
}

// Widehead takes no negative strides, and whether a view is reversed shows only here: copies.
std::vector<mx::array> none_reversed(const std::vector<mx::array>& inputs) {
  std::vector<mx::array> all;
  for (const mx::array& each : inputs) {
    if (!is_reversed(each)) {
      all.push_back(each);
      continue;
    }
    mx::array copy(each.shape(), each.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(each.nbytes()));
    char* to = copy.data<char>();
    copy_elements(each, 0, each.data<char>(), to);
    all.push_back(std::move(copy));
  }
  return all;
}

void run(const Call& call, const std::vector<mx::array>& outputs) {
  const auto view = [&](const mx::array& a) { return call.view(a, host_memory); };
  widehead::Options options = call.widehead_options(host_memory);
  if (outputs.size() > 1) options.log_sum_exp = const_cast<float*>(outputs[1].data<float>());
  const std::vector<mx::array>& in = call.inputs;
  widehead::attention(view(in[0]), view(in[1]), view(in[2]), view(outputs[0]), options,
                      call.options.limits);
}

void run_backward(const Call& call, const std::vector<mx::array>& outputs) {
  const BackwardTensors t = call.backward_tensors(outputs, host_memory);
  widehead::backward(t.q, t.k, t.v, t.out, t.gradients, t.options, call.options.limits);
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
  encoder.dispatch([run, call = std::move(call), outputs = weak_copies(outputs)] {
    run({call.stream, call.options, call.present, none_reversed(call.inputs)}, outputs);
  });
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
