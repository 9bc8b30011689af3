#include "append.h"

#include <widehead/widehead.h>

#include <algorithm>

#include "call.h"

namespace widehead_python {
namespace {

// [tokens, heads_kv, dim], as many tokens and heads as the first has.
const void* read_new(const char* name, const Tensor& tensor, const wh_problem& cache, int64_t dim,
                     int64_t tokens, int64_t (&strides)[3]) {
  expect_shape(tensor, {tokens, cache.heads_kv, dim}, name);
  std::copy_n(tensor.strides.begin(), 3, strides);
  return tensor.data;
}

}  // namespace

void append(nb::handle k, nb::handle v, nb::handle new_k, nb::handle new_v, nb::handle slots,
            nb::handle stream) {
  const nb::object none = nb::none();
  const Tensor keys(stored_of(k), "k", stream, Access::kWrite);
  const bool is_packed = keys.ndim == 3;
  if (!is_packed && keys.ndim != 4) {
    fail_value("k is " + keys.shape_text() +
               "; it must be [pages, heads_kv, page_size, dim_qk], or [tokens, heads_kv, dim_qk]");
  }
  const Tensor fresh_k(new_k, "new_k", stream, Access::kRead);
  if (fresh_k.ndim != 3) {
    fail_value("new_k is " + fresh_k.shape_text() + "; it must be [tokens, heads_kv, dim_qk]");
  }
  // A problem of no queries, which is where the cache's layout, format and scales are read. Pages
  // and sequences of a dense cache number their rows alike: a pool is read as a dense cache.
  const int64_t batch = is_packed ? 1 : keys.shape[0];
  const nb::object q = nb::cast(Spec{{batch, keys.shape[1], 0, fresh_k.shape[2]},
                                     Element::kFloat32,
                                     keys.device_type,
                                     keys.device_id});
  nb::object layouts = none;
  if (is_packed) {
    nb::list offsets;
    offsets.append(0);
    offsets.append(keys.shape[0]);
    const nb::object key_offsets =
        keys.on_cuda() ? nb::cast(Spec{{2}, Element::kInt32, keys.device_type, keys.device_id})
                       : nb::object(offsets);
    layouts = nb::make_tuple(none, key_offsets, none, none, none, keys.shape[0]);
  }
  const Call cache({q, k, v, none, nb::handle(Py_False), none, none, none, none, none, none,
                    layouts, false, none, stream, Access::kWrite});
  const wh_problem& problem = cache.problem();
  wh_appended appended;
  wh_appended_init(&appended, sizeof(appended));
  cache.write_into(appended);
  appended.tokens = fresh_k.shape[0];
  appended.dtype = dtype_of(fresh_k);
  cache.expect_same_device(fresh_k);
  appended.new_k = read_new("[tokens, heads_kv, dim_qk]", fresh_k, problem, problem.dim_qk,
                            appended.tokens, appended.stride_new_k);
  std::optional<Tensor> fresh_v;
  if ((problem.uses & WH_USES_VALUES_IN_KEYS) == 0) {
    fresh_v.emplace(new_v, "new_v", stream, Access::kRead);
    cache.expect_same_device(*fresh_v);
    if (dtype_of(*fresh_v) != appended.dtype) {
      fail_type("new_v is " + fresh_v->dtype_text() + "; it must be of new_k's type, " +
                fresh_k.dtype_text());
    }
    appended.new_v = read_new("[tokens, heads_kv, dim_v]", *fresh_v, problem, problem.dim_v,
                              appended.tokens, appended.stride_new_v);
  }
  const Tensor places(slots, "slots", stream, Access::kRead);
  cache.expect_same_device(places);
  expect_shape(places, {appended.tokens}, "[tokens]");
  std::vector<int64_t> copy;
  if (places.element == Element::kInt64 && (appended.tokens <= 1 || places.strides[0] == 1)) {
    appended.slots = static_cast<const int64_t*>(places.data);
  } else if (places.on_cuda() ||
             (places.element != Element::kInt32 && places.element != Element::kInt64)) {
    fail_type("slots is " + places.dtype_text() + "; it must be int64, contiguous on CUDA");
  } else {
    for (int64_t i = 0; i < appended.tokens; ++i) {
      const int64_t at = i * places.strides[0];
      copy.push_back(places.element == Element::kInt64
                         ? static_cast<const int64_t*>(places.data)[at]
                         : static_cast<const int32_t*>(places.data)[at]);
    }
    appended.slots = copy.data();
  }
  const wh_run_options options = run_options_of(keys, stream);
  wh_status status = WH_OK;
  {
    const nb::gil_scoped_release release;
    status = wh_append(&problem, &appended, &options);
  }
  check(status);
}

}  // namespace widehead_python
