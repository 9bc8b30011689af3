// Writes new keys and values into caches by slots: wh_append() on a device.
//
// Schedule: a block for each token and cache. Its threads take 16 bytes each of the rows of all
// heads where rows are copied and aligned, an element each otherwise. Codes: a warp for each head,
// which finds the row's largest element first where tokens have scales of their own; a thread for
// each block of 32 elements in formats of blocks.
//
// Roofline: a row through memory twice, read and written. Codes are rounded by core/quantised.h, as
// on the host, to the same bytes.
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
    AppendedRows rows;
    int64_t pieces;  // of a row that has no codes: vectors, or elements
    bool has_vectors;
  };
  KvAppend append;
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

// Elements of a token's row of one head as f32.
template <typename From>
struct NewRow {
  const From* first;
  int64_t stride;

  __device__ __forceinline__ float operator()(int64_t d) const {
    return static_cast<float>(first[d * stride]);
  }
};
template <typename From>
__device__ __forceinline__ NewRow<From> new_row(const AppendedRows& rows, int64_t token,
                                                int64_t head) {
  return {static_cast<const From*>(rows.rows) + rows.offset(token, head), rows.stride[2]};
}

// Of a thread's elements, of all lanes: the largest magnitude, NaN where there is one. As integers,
// which have the same order, and NaN behind infinity.
template <typename Row>
__device__ __forceinline__ float warp_largest(const Row& row, int64_t dim) {
  uint32_t largest = 0;
  for (int64_t d = threadIdx.x % 32; d < dim; d += 32) {
    largest = max(largest, __float_as_uint(magnitude_of(row(d))));
  }
  return __uint_as_float(__reduce_max_sync(~0u, largest));
}

template <typename Code, typename From>
__device__ __forceinline__ void append_codes(const KvAppend& append, const AppendedRows& rows,
                                             int64_t token, int64_t slot) {
  const KvTensor& stored = rows.stored;
  for (int64_t head = threadIdx.x / 32; head < append.heads_kv; head += kThreads / 32) {
    const NewRow<From> row = new_row<From>(rows, token, head);
    const KvPlace at = append.place(slot, head);
    float own = 1;
    if (stored.scales == Scales::kTokenHead) {
      own = scale_of_largest(warp_largest(row, stored.dim), stored.format);
      if (threadIdx.x % 32 == 0) rows.scales[stored.scale_offset(at)] = own;
    }
    Code* const to = static_cast<Code*>(rows.cache) + stored.offset(at);
    for (int64_t d = threadIdx.x % 32; d < stored.dim; d += 32) {
      const float scale = stored.scales == Scales::kTokenHead ? own : stored.scale(at, d);
      to[d * stored.stride[3]] = from_float<Code>(unscaled(row(d), scale));
    }
  }
}

template <typename Block, typename From>
__device__ __forceinline__ void append_blocks(const KvAppend& append, const AppendedRows& rows,
                                              int64_t token, int64_t slot) {
  const KvTensor& stored = rows.stored;
  const int64_t blocks = stored.dim / kBlockElements;
  for (int64_t i = threadIdx.x; i < append.heads_kv * blocks; i += kThreads) {
    const int64_t head = i / blocks, first = i % blocks * kBlockElements;
    NewRow<From> row = new_row<From>(rows, token, head);
    row.first += first * row.stride;
    const int64_t to = stored.offset(append.place(slot, head)) + first;
    round_block(row, static_cast<Block*>(rows.cache)[to / kBlockElements]);
  }
}

template <typename From>
__device__ __forceinline__ void append_elements(const KvAppend& append,
                                                const AppendArgs::Cache& cache, int64_t token,
                                                int64_t slot) {
  const AppendedRows& rows = cache.rows;
  const KvTensor& stored = rows.stored;
  for (int64_t i = threadIdx.x; i < append.heads_kv * cache.pieces; i += kThreads) {
    const int64_t head = i / cache.pieces, piece = i % cache.pieces;
    const From* const row = static_cast<const From*>(rows.rows) + rows.offset(token, head);
    with_type(stored.dtype, [&]<typename To>(To) {
      To* const to = static_cast<To*>(rows.cache) + stored.offset(append.place(slot, head));
      if (cache.has_vectors) {
        reinterpret_cast<uint4*>(to)[piece] = reinterpret_cast<const uint4*>(row)[piece];
      } else {
        to[piece * stored.stride[3]] = rounded<From, To>(row[piece * rows.stride[2]]);
      }
    });
  }
}

// Told that four blocks are enough, ptxas keeps what divisions need in registers.
__global__ void __launch_bounds__(kThreads, 4)
    append_rows(const __grid_constant__ AppendArgs args) {
  const KvAppend& append = args.append;
  for (int64_t work = blockIdx.x; work < append.tokens * append.caches; work += gridDim.x) {
    const AppendArgs::Cache& cache = args.of[work % append.caches];
    const int64_t token = work / append.caches;
    const int64_t slot = append.slots[token];
    // Nobody has looked at it: what lies beyond the cache is not written.
    if (slot < 0 || slot >= append.slot_count()) continue;
    with_type(cache.rows.dtype, [&]<typename From>(From) {
      switch (cache.rows.stored.format) {
        case Quantised::kNone:
          return append_elements<From>(append, cache, token, slot);
        case Quantised::kE4m3:
          return append_codes<E4m3, From>(append, cache.rows, token, slot);
        case Quantised::kInt8:
          return append_codes<Int8, From>(append, cache.rows, token, slot);
        case Quantised::kQ8_0:
          return append_blocks<Q8_0, From>(append, cache.rows, token, slot);
        case Quantised::kQ4_0:
          return append_blocks<Q4_0, From>(append, cache.rows, token, slot);
      }
    });
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
  const bool is_by_vectors = has_vectors(rows);
  const int64_t elements =
      is_by_vectors ? kVectorBytes / static_cast<int64_t>(dtype_bytes(rows.dtype)) : 1;
  return {rows, rows.stored.dim / elements, is_by_vectors};
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
  const NamedPointer pointers[] = {{"slots", append.slots},
                                   {"new_k", k.rows},
                                   {"k", k.cache},
                                   {"scales_k", k.stored.scales_data},
                                   {"new_v", v.rows},
                                   {"v", v.cache},
                                   {"scales_v", v.stored.scales_data}};
  WH_RETURN_IF_ERROR(check_pointers(pointers, on.device_index));
  AppendArgs args{append, {cache_of(k), cache_of(v)}};
  constexpr int64_t kMostBlocks = 1 << 20;  // the rest is a loop
  void* parameters[] = {&args};
  return launch_kernel(
      {.function = reinterpret_cast<const void*>(&append_rows),
       .blocks = static_cast<int>(std::min(kMostBlocks, append.tokens * append.caches)),
       .threads = kThreads,
       .shared_bytes = 0,
       .parameters = parameters,
       .stream = static_cast<cudaStream_t>(on.stream)});
}

}  // namespace wh::cuda
