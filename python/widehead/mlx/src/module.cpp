// widehead.mlx's primitive for Python. The package around it gives names, defaults and types.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>

#include "attention.h"

namespace nb = nanobind;
using namespace nb::literals;
using widehead_mlx::Extras;
using widehead_mlx::mx::array;

namespace {

// As Limits.core_values() of the package, which has checked the names.
widehead::Limits make_limits(std::optional<uint64_t> workspace_bytes, const std::string& policy,
                             int64_t fused_above, const std::string& kernel, int32_t threads,
                             const std::string& precision, double longest_step_us,
                             bool batch_invariant, int64_t fresh_keys) {
  using widehead::Policy;
  widehead::Limits limits;
  limits.workspace_bytes = workspace_bytes.value_or(WH_NO_BYTE_LIMIT);
  limits.policy = policy == "fused"         ? Policy::kFused
                  : policy == "fused_above" ? Policy::kFusedAbove
                                            : Policy::kAutomatic;
  limits.fused_above = fused_above;
  limits.kernel = kernel;
  limits.threads = threads;
  limits.precision =
      precision == "high" ? widehead::Precision::kHigh : widehead::Precision::kNative;
  limits.longest_step_us = longest_step_us;
  limits.batch_invariant = batch_invariant;
  limits.fresh_keys = fresh_keys;
  return limits;
}

array attention(const array& q, const array& k, const array& v, float scale, bool causal,
                int64_t window_left, float softcap, std::optional<array> mask,
                std::optional<array> sinks, std::optional<array> key_starts,
                const widehead::Limits& limits, widehead_mlx::mx::StreamOrDevice stream) {
  return widehead_mlx::attention(q, k, v, {scale, softcap, causal, window_left, limits},
                                 Extras{std::move(mask), std::move(sinks), std::move(key_starts)},
                                 stream);
}

}  // namespace

NB_MODULE(WIDEHEAD_MLX_MODULE, m) {
  nb::module_::import_("mlx.core");  // registers array, Stream and Device
  nb::class_<widehead::Limits>(m, "Limits");
  m.def("limits", &make_limits, "workspace_bytes"_a.none(), "policy"_a, "fused_above"_a, "kernel"_a,
        "threads"_a, "precision"_a, "longest_step_us"_a, "batch_invariant"_a, "fresh_keys"_a);
  m.def("attention", &attention, "q"_a, "k"_a, "v"_a, "scale"_a, "causal"_a, "window_left"_a,
        "softcap"_a, "mask"_a.none(), "sinks"_a.none(), "key_starts"_a.none(), "limits"_a,
        "stream"_a.none());
  // A second handle of an array, and whether two still are of the same one: an in-place operation
  // gives a Python object another array.
  m.def(
      "handle", [](const array& a) { return a; }, "a"_a);
  m.def(
      "is_same", [](const array& a, const array& b) { return a.id() == b.id(); }, "a"_a, "b"_a);
}
