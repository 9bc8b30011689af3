// The GPU's part on MLX's CUDA backend: a plan's launches become nodes of the graph that MLX
// builds.
#include <mlx/backend/cuda/device.h>
#include <mlx/backend/cuda/utils.h>

#include <mutex>
#include <stdexcept>

#include "attention.h"

namespace widehead_mlx {
namespace {

const void* device_memory(const mx::array& a) { return mx::gpu_ptr<void>(a); }

// New memory of the device. MLX's allocator of it is hidden in the library, and the public one
// gives managed memory, whose pages move at the first touch: so one of MLX's operations allocates,
// and its kernel's writes are the price, a few microseconds for an output of 25 MB. A word or less
// would come from a pool of words, where a workspace is not aligned as plans ask.
mx::array new_memory(size_t bytes, mx::Stream stream) {
  const size_t words = std::max<size_t>(64, bytes + 7) / 8;
  mx::array memory = mx::arange(0.0, static_cast<double>(words), 1.0, mx::int64, stream);
  std::vector<mx::array> made{memory};
  memory.primitive().eval_gpu({}, made);
  return memory;
}

// cuda_unfused starts cuBLASLt at its first run on a device, which no capture may see: one query
// over one key of whatever is in the memory, outside of it.
void start_cublas(mx::Stream stream, const widehead::Options& options) {
  static std::mutex mutex;
  static std::vector<int32_t> started;
  const std::lock_guard lock(mutex);
  for (const int32_t device : started) {
    if (device == options.device_index) return;
  }
  widehead::Options tiny;
  tiny.device = options.device;
  tiny.device_index = options.device_index;
  const auto tensor = [&] {
    return widehead::TensorView(nullptr, widehead::Dtype::kF16, {1, 1, 1, 64});
  };
  widehead::Limits limits;
  limits.kernel = "cuda_unfused";
  const widehead::Plan plan(widehead::problem(tensor(), tensor(), tensor(), tensor(), tiny),
                            limits);
  const mx::array memory = new_memory(plan.workspace_bytes() + 4 * 128, stream);
  const auto* base = static_cast<const char*>(device_memory(memory));
  auto view = [&](size_t i) {
    widehead::TensorView made = tensor();
    made.data = const_cast<char*>(base) + plan.workspace_bytes() + 128 * i;
    return made;
  };
  wh_tensors tensors = widehead::tensors(view(0), view(1), view(2), view(3));
  tensors.workspace = const_cast<char*>(base);
  tensors.workspace_bytes = plan.workspace_bytes();
  auto& encoder = mx::cu::get_command_encoder(stream);
  encoder.add_temporary(memory);
  widehead::RunOptions run;
  run.stream = static_cast<cudaStream_t>(encoder.stream());
  plan.run(tensors, run);
  started.push_back(options.device_index);
}

void refuse_reversed(const std::vector<mx::array>& inputs) {
  for (const mx::array& each : inputs) {
    if (is_reversed(each)) {
      throw std::invalid_argument(
          "an argument of widehead.mlx.sdpa has a negative stride, which no kernel on a GPU takes: "
          "pass mx.contiguous() of it");
    }
  }
}

void run_in_graph(const widehead::Plan& plan, wh_tensors tensors,
                  const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs,
                  mx::Stream stream) {
  const mx::array workspace = new_memory(plan.workspace_bytes(), stream);
  tensors.workspace = const_cast<void*>(device_memory(workspace));
  tensors.workspace_bytes = plan.workspace_bytes();
  auto& encoder = mx::cu::get_command_encoder(stream);
  encoder.add_temporary(workspace);
  // What these name orders the launches behind whoever writes it and before whoever reads it.
  for (const mx::array& each : inputs) encoder.set_input_array(each);
  encoder.set_output_array(workspace);
  for (const mx::array& each : outputs) encoder.set_output_array(each);
  widehead::RunOptions run;
  run.stream = static_cast<cudaStream_t>(encoder.stream());
  auto capture = encoder.capture_context();
  try {
    plan.run(tensors, run);
  } catch (...) {
    capture.discard = true;  // and with it the nodes that did get in
    throw;
  }
}

}  // namespace

void Attention::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  refuse_reversed(inputs);
  for (mx::array& each : outputs) adopt(each, new_memory(each.nbytes(), stream()));
  if (outputs[0].size() == 0) return;
  const Call call{stream(), options_, present_, inputs};
  widehead::Options options = call.widehead_options(device_memory);
  if (has_log_sum_exp_) {
    options.log_sum_exp = static_cast<float*>(const_cast<void*>(device_memory(outputs[1])));
  }
  const auto view = [&](const mx::array& a) { return call.view(a, device_memory); };
  const widehead::TensorView q = view(inputs[0]), k = view(inputs[1]), v = view(inputs[2]);
  const widehead::TensorView out = view(outputs[0]);
  const widehead::Plan plan(widehead::problem(q, k, v, out, options), options_.limits);
  if (plan.kernel() == "cuda_unfused") start_cublas(stream(), options);
  run_in_graph(plan, widehead::tensors(q, k, v, out, options), inputs, outputs, stream());
}

void AttentionGradients::eval_gpu(const std::vector<mx::array>& inputs,
                                  std::vector<mx::array>& outputs) {
  refuse_reversed(inputs);
  for (mx::array& each : outputs) adopt(each, new_memory(each.nbytes(), stream()));
  const Call call{stream(), options_, present_, inputs};
  const BackwardTensors t = call.backward_tensors(outputs, device_memory);
  const widehead::Plan plan(widehead::problem(t.q, t.k, t.v, t.out, t.gradients, t.options),
                            options_.limits);
  run_in_graph(plan, widehead::tensors(t.q, t.k, t.v, t.out, t.gradients, t.options), inputs,
               outputs, stream());
}

}  // namespace widehead_mlx
