// Grouped-query attention from C++: one call, then a plan inside a budget.
#include <iostream>
#include <vector>
#include <widehead/widehead.hpp>

int main() {
  using widehead::Dtype;
  std::vector<float> q(8 * 16 * 256, 0.1f), k(2 * 128 * 256, 0.2f), v(2 * 128 * 256, 3.0f);
  std::vector<float> out(q.size());
  const widehead::TensorView q_view(q.data(), Dtype::kF32, {1, 8, 16, 256});
  const widehead::TensorView k_view(k.data(), Dtype::kF32, {1, 2, 128, 256});
  const widehead::TensorView v_view(v.data(), Dtype::kF32, {1, 2, 128, 256});
  const widehead::TensorView out_view(out.data(), Dtype::kF32, {1, 8, 16, 256});
  const widehead::Options options{.causal = widehead::Causal::kBottomRight};

  widehead::attention(q_view, k_view, v_view, out_view, options);
  std::cout << "out[0] = " << out[0] << "\n\n";

  try {
    const auto problem = widehead::problem(q_view, k_view, v_view, out_view, options);
    const auto plan = widehead::plan(problem, {.workspace_bytes = 8 << 20});
    std::cout << plan.explain() << "\n";
    plan.run(q_view, k_view, v_view, out_view);
    widehead::plan(problem, {.workspace_bytes = 1 << 10});
  } catch (const widehead::Error& error) {
    std::cout << "with 1 KiB: " << error.what() << "\n";
  }
}
