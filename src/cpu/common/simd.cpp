#include "cpu/common/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/common/simd.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

const char* target_name() { return hwy::TargetName(HWY_TARGET); }
int32_t target_floats() { return static_cast<int32_t>(hn::Lanes(hn::ScalableTag<float>())); }

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(target_name);
HWY_EXPORT(target_floats);

const char* simd_target_name() { return HWY_DYNAMIC_DISPATCH(target_name)(); }
int32_t simd_floats() { return HWY_DYNAMIC_DISPATCH(target_floats)(); }
}  // namespace wh::cpu
#endif
