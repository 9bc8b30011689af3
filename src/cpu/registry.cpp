#include "cpu/registry.h"

#include "cpu/backward/config.h"
#include "cpu/decode/config.h"
#include "cpu/prefill/config.h"
#include "cpu/prefill_bf16/config.h"
#include "cpu/unfused/unfused.h"

namespace wh::cpu {

std::span<const Kernel* const> kernels() {
  static const Kernel* const list[] = {&kPrefillBf16, &kPrefill,  &kDecode,           &kUnfused,
                                       &kReference,   &kBackward, &kReferenceBackward};
  return list;
}

}  // namespace wh::cpu
