// libFuzzer: any text as a stored plan.
#include <cstdint>

#include "widehead/widehead.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  wh_plan* plan = nullptr;
  (void)wh_plan_from_json(reinterpret_cast<const char*>(data), size, &plan);
  (void)wh_plan_explain(plan);
  wh_plan_destroy(plan);
  return 0;
}
