#include "api/append.h"

#include "core/kv_append.h"
#include "core/names.h"
#include "core/problem_fields.h"
#include "plan/backend.h"

namespace wh {

Status append(const Problem& cache, const wh_appended& a, const RunOptions& options) {
  WH_RETURN_IF_ERROR(Choice("dtype", "dtype", kDtypes).check(a.dtype));
  const auto dtype = static_cast<Dtype>(a.dtype);
  // What the problem does not use is not read.
  const Tensors tensors{.k = a.k,
                        .v = a.v,
                        .scales_k = cache.scales_k == Scales::kNone ? nullptr : a.scales_k,
                        .scales_v = cache.scales_v == Scales::kNone ? nullptr : a.scales_v};
  const auto& k = a.stride_new_k;
  const auto& v = a.stride_new_v;
  const KvAppend work{
      a.tokens,
      cache.heads_kv,
      a.slots,
      key_storage(cache),
      cache.values_in_keys ? 1 : 2,
      {AppendedRows{
           true, a.new_k, dtype, {k[0], k[1], k[2]}, a.k, a.scales_k, keys_of(cache, tensors)},
       AppendedRows{
           false, a.new_v, dtype, {v[0], v[1], v[2]}, a.v, a.scales_v, values_of(cache, tensors)}}};
  WH_RETURN_IF_ERROR(check(cache, work));
  if (work.tokens == 0) return {};
  const Backend& device = backend(cache.device);
  if (device.is_host()) WH_RETURN_IF_ERROR(check_slots(work));
  return device.append(work, options.executor, {cache.device_index, options.stream});
}

}  // namespace wh
