// libFuzzer: any bytes as a safetensors file, and as a problem with its tensors.
#include <cstdint>

#include "input/safetensors.h"
#include "input/stored_problem.h"

namespace {

// AddressSanitizer watches.
void read_all(const void* data, int64_t bytes) {
  volatile std::byte sum{};
  for (int64_t i = 0; i < bytes; ++i) sum = sum ^ static_cast<const std::byte*>(data)[i];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto view = wh::cli::parse_safetensors({reinterpret_cast<const std::byte*>(data), size});
  if (!view.ok()) return 0;
  for (const auto& [name, tensor] : view->tensors) {
    read_all(tensor.bytes.data(), static_cast<int64_t>(tensor.bytes.size()));
  }
  const auto stored = wh::cli::read_problem(*view, {});
  if (!stored.ok()) return 0;
  const wh::Problem& p = stored->request.problem;
  const wh::Tensors& t = stored->tensors;
  if (!wh::validate(p, t).ok()) return 0;
  // What is valid lies inside its tensors.
  const wh::TensorBytes bytes = wh::tensor_bytes(p);
  read_all(t.q, bytes.q);
  read_all(t.k, bytes.k);
  read_all(t.v, bytes.v);
  read_all(t.mask, bytes.mask);
  read_all(t.sinks, bytes.sinks);
  read_all(t.key_lengths, bytes.key_lengths);
  read_all(t.key_starts, bytes.key_starts);
  return 0;
}
