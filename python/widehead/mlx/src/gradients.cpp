#include "attention.h"

namespace widehead_mlx {
namespace {

// In any memory.
bool has_kernel(const wh_problem& problem, widehead::Limits limits) {
  limits.workspace_bytes = WH_NO_BYTE_LIMIT;
  try {
    widehead::plan(problem, limits);
    return true;
  } catch (const widehead::Error& error) {
    if (error.status() == WH_REFUSED) return false;
    throw;
  }
}

}  // namespace

std::vector<mx::array> gradients_of(mx::Stream stream, const Options& options, Present present,
                                    const std::vector<mx::array>& inputs,
                                    const std::vector<mx::array>& outputs, const mx::array& d_out) {
  // A kernel is forced, and a policy chosen, for the forward pass alone.
  Options allowed = options;
  allowed.limits.kernel.clear();
  allowed.limits.policy = widehead::Policy::kAutomatic;
  std::vector<mx::array> all = inputs;
  // Second derivatives are those of the formula, of q, k and v: nothing goes through these.
  for (const mx::array& each : outputs) all.push_back(mx::stop_gradient(each, stream));
  all.push_back(d_out);
  auto gradients = std::make_shared<AttentionGradients>(stream, allowed, present);
  const mx::Dtype type = inputs[0].dtype();
  std::vector<mx::Dtype> types{type, type, type};
  if (present.sinks) types.push_back(mx::float32);
  const std::vector<mx::array> made =
      mx::array::make_arrays(gradients->output_shapes(all), types, gradients, all);
  // A plan asks what is there, and reads no memory.
  const auto somewhere = [](const mx::array& a) -> const void* { return &a; };
  const BackwardTensors t = Call{stream, allowed, present, all}.backward_tensors(made, somewhere);
  const wh_problem problem = widehead::problem(t.q, t.k, t.v, t.out, t.gradients, t.options);
  if (is_gpu(stream) && !has_kernel(problem, allowed.limits)) return {};
  // A refusal, while it can still be caught.
  if (allowed.limits.workspace_bytes != WH_NO_BYTE_LIMIT) widehead::plan(problem, allowed.limits);
  return made;
}

std::vector<mx::Shape> AttentionGradients::output_shapes(const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes{inputs[0].shape(), inputs[1].shape(), inputs[2].shape()};
  if (present_.sinks) shapes.push_back({inputs[0].shape(1)});
  return shapes;
}

std::vector<mx::array> AttentionGradients::formula(const std::vector<mx::array>& inputs) {
  std::vector<int> argnums{0, 1, 2};
  if (present_.sinks) argnums.push_back(present_.sinks_input());
  const std::vector<mx::array> primals(inputs.begin(), inputs.end() - 3);
  return Attention(stream(), options_, present_, false).vjp(primals, {inputs.back()}, argnums, {});
}

}  // namespace widehead_mlx
