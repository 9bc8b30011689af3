// Writes new keys and values into caches by slots: wh_append() on a device.
//
// Schedule: a block for each token and cache. Its threads take 16 bytes each of the rows of all
// heads where rows are copied and aligned, an element each otherwise.
//
// Roofline: a row through memory twice, read and written.
#include <algorithm>
#include <type_traits>

#include "cuda/combine/append.h"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.h"
#include "cuda/cuda_facts.h"
#include "cuda/device.h"

namespace wh::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVectorBytes = 16;

struct AppendArgs {
  struct Cache {
    const void* rows;
    void* to;
    int64_t stride_rows[3], stride_to[4];
    Dtype dtype, dtype_to;
    int64_t pieces;  // of a row: vectors, or elements
    bool has_vectors;
  };
  int64_t tokens, length, slot_count, heads;
  int32_t caches;
  const int64_t* slots;
  Cache of[2];
};

template <typename From, typename To>
__device__ __forceinline__ To rounded(From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else {
    return static_cast<To>(static_cast<float>(value));
  }
}

__global__ void __launch_bounds__(kThreads) append_rows(const __grid_constant__ AppendArgs args) {
  for (int64_t work = blockIdx.x; work < args.tokens * args.caches; work += gridDim.x) {
    const AppendArgs::Cache& cache = args.of[work % args.caches];
    const int64_t token = work / args.caches;
    const int64_t slot = args.slots[token];
    // Nobody has looked at it: what lies beyond the cache is not written.
    if (slot < 0 || slot >= args.slot_count) continue;
    const int64_t first = token * cache.stride_rows[0];
    const int64_t first_to =
        slot / args.length * cache.stride_to[0] + slot % args.length * cache.stride_to[2];
    for (int64_t i = threadIdx.x; i < args.heads * cache.pieces; i += kThreads) {
      const int64_t head = i / cache.pieces, piece = i % cache.pieces;
      const int64_t from = first + head * cache.stride_rows[1];
      const int64_t to = first_to + head * cache.stride_to[1];
      with_type(cache.dtype, [&]<typename From>(From) {
        const From* const row = static_cast<const From*>(cache.rows) + from;
        with_type(cache.dtype_to, [&]<typename To>(To) {
          To* const row_to = static_cast<To*>(cache.to) + to;
          if (cache.has_vectors) {
            reinterpret_cast<uint4*>(row_to)[piece] = reinterpret_cast<const uint4*>(row)[piece];
          } else {
            row_to[piece * cache.stride_to[3]] =
                rounded<From, To>(row[piece * cache.stride_rows[2]]);
          }
        });
      });
    }
  }
}

bool has_vectors(const AppendedRows& rows) {
  const Strides& to = rows.stored.stride;
  const auto element = static_cast<int64_t>(dtype_bytes(rows.dtype));
  const auto is_whole = [&](int64_t elements) { return elements * element % kVectorBytes == 0; };
  const auto is_aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  };
  return rows.is_copy() && rows.stride[2] == 1 && to[3] == 1 && is_whole(rows.stored.dim) &&
         is_whole(rows.stride[0]) && is_whole(rows.stride[1]) && is_whole(to[0]) &&
         is_whole(to[1]) && is_whole(to[2]) && is_aligned(rows.rows) && is_aligned(rows.cache);
}

AppendArgs::Cache cache_of(const AppendedRows& rows) {
  AppendArgs::Cache cache{};
  cache.rows = rows.rows;
  cache.to = rows.cache;
  std::copy(rows.stride.begin(), rows.stride.end(), cache.stride_rows);
  std::copy(rows.stored.stride.begin(), rows.stored.stride.end(), cache.stride_to);
  cache.dtype = rows.dtype;
  cache.dtype_to = rows.stored.dtype;
  cache.has_vectors = has_vectors(rows);
  const int64_t elements =
      cache.has_vectors ? kVectorBytes / static_cast<int64_t>(dtype_bytes(rows.dtype)) : 1;
  cache.pieces = rows.stored.dim / elements;
  return cache;
}

}  // namespace

Status append(const KvAppend& append, DeviceStream on) {
  if (const std::string& reason = cuda_facts(on.device_index).unavailable; !reason.empty()) {
    return {Code::kRefused, reason};
  }
  const DeviceScope scope(on.device_index);
  WH_RETURN_IF_ERROR(scope.status());
  WH_RETURN_IF_ERROR(check_stream(on.device_index, on.stream));
  const AppendedRows &k = append.of[0], &v = append.of[append.caches - 1];
  if (k.stored.format != Quantised::kNone || v.stored.format != Quantised::kNone) {
    return {Code::kRefused,
            "CUDA devices append to caches of f32, f16 and bf16; this one is quantised"};
  }
  const NamedPointer pointers[] = {{"slots", append.slots},
                                   {"new_k", k.rows},
                                   {"k", k.cache},
                                   {"new_v", v.rows},
                                   {"v", v.cache}};
  WH_RETURN_IF_ERROR(check_pointers(pointers, on.device_index));
  AppendArgs args{};
  args.tokens = append.tokens;
  args.length = append.storage.length;
  args.slot_count = append.slot_count();
  args.heads = append.heads_kv;
  args.caches = append.caches;
  args.slots = append.slots;
  for (int32_t i = 0; i < append.caches; ++i) args.of[i] = cache_of(append.of[i]);
  constexpr int64_t kMostBlocks = 1 << 20;  // the rest is a loop
  void* parameters[] = {&args};
  return launch_kernel(
      {.function = reinterpret_cast<const void*>(&append_rows),
       .blocks = static_cast<int>(std::min(kMostBlocks, args.tokens * args.caches)),
       .threads = kThreads,
       .shared_bytes = 0,
       .parameters = parameters,
       .stream = static_cast<cudaStream_t>(on.stream)});
}

}  // namespace wh::cuda
