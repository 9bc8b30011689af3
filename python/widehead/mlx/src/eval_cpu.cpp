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

void run(const Call& call, const mx::array& out) {
  const auto view = [&](const mx::array& a) { return call.view(a, host_memory); };
  const Dense q(call.inputs[0], view(call.inputs[0]));
  const Dense k(call.inputs[1], view(call.inputs[1]));
  const Dense v(call.inputs[2], view(call.inputs[2]));
  widehead::attention(q.view(), k.view(), v.view(), view(out), call.widehead_options(host_memory),
                      call.options.limits);
}

}  // namespace

void Attention::eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) {
  out.set_data(mx::allocator::malloc(out.nbytes()), out.size(), output_strides(out),
               output_flags(out));
  if (out.size() == 0) return;
  auto& encoder = mx::cpu::get_command_encoder(stream());
  // MLX keeps inputs and output alive until the task is done; copies that count would keep it from
  // reusing their memory.
  Call call{options_, present_, {}};
  for (const mx::array& each : inputs) {
    encoder.set_input_array(each);
    call.inputs.push_back(mx::array::unsafe_weak_copy(each));
  }
  encoder.set_output_array(out);
  // Strides are final only when the task runs.
  encoder.dispatch(
      [call = std::move(call), out = mx::array::unsafe_weak_copy(out)] { run(call, out); });
}

}  // namespace widehead_mlx
