// The GPU's part of a build without CUDA.
#include <stdexcept>

#include "attention.h"

namespace widehead_mlx {
namespace {

[[noreturn]] void fail() {
  throw std::runtime_error(
      "widehead.mlx was built without CUDA, and this array's stream is a GPU's; "
      "`python -m widehead.mlx` says what building with it takes");
}

}  // namespace

void Attention::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) { fail(); }

void AttentionGradients::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  fail();
}

}  // namespace widehead_mlx
