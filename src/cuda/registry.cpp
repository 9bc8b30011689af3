#include "cuda/registry.h"

#include "cuda/portable/backward/config.h"
#include "cuda/portable/config.h"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward_wide/config.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/prefill_wide/config.h"
#include "cuda/unfused/config.h"

namespace wh::cuda {

std::span<const Kernel* const> kernels() {
  static const Kernel* const list[] = {&kSm90Prefill,      &kSm90PrefillWide, &kSm90Decode,
                                       &kPortable,         &kUnfused,         &kSm90Backward,
                                       &kSm90BackwardWide, &kPortableBackward};
  return list;
}

}  // namespace wh::cuda
