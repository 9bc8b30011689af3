// sm90_decode: few queries against many keys, on Hopper.
//
// Schedule: a block an SM, two where heads are narrow. A block owns up to 64 query rows that share
// a kv head (queries x heads of the group, query-major) and one share of the key tiles that any of
// them sees. One producer thread streams K and V tiles by TMA through one ring of slots (K0 V0 K1
// V1 ..., up to 192 KB of an SM in flight); the consumer warpgroup does S = Q K^T from shared
// memory, masks, online softmax, and O += P V with P in registers, one after the other. V wider
// than 256 is split over two warpgroups, which both compute S. Several shares of keys leave
// normalised partial rows, merged by combine.cu.
//
// Roofline: (dim_qk + dim_v) * 2 bytes a key out of memory. At dim 256 a tile of 64 keys is 64 KB
// or 5,000 clocks of one SM's share of 2.9 TB/s, and its products are 1,024 clocks at M = 64
// however few the rows: neither that padding nor the serial order of the steps shows. Tiles of 32
// keys were 9 % slower at 16K keys.
//
// NaN and infinity in V: a key that no row of the block sees is zeroed in shared memory before it
// meets the weight 0. A key that some rows see and others do not is rare enough (array masks,
// several queries) to be looked for afterwards: a warp whose sums came out NaN or infinite computes
// them again without tensor cores, skipping what each row must not see.
//
// At a few thousand keys the call is latency: 1,000 instructions in a row of a lone warp are 2.5
// us. Hence what can be computed before the kernel in front has ended is; Q is asked for before K
// and V (behind 192 KB an SM it arrived 7 us later); and shares leave through shared memory in
// whole rows (from registers, 8 rows an instruction, they took 1.4 us).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <iterator>
#include <type_traits>

#include "cuda/common/element.cuh"
#include "cuda/sm90/common/products.cuh"
#include "cuda/sm90/common/ring.cuh"
#include "cuda/sm90/common/tile_softmax.cuh"
#include "cuda/sm90/decode/block.cuh"
#include "cuda/sm90/decode/shares.cuh"
#include "cuda/sm90/decode/tiles.h"
#include "cuda/sm90/decode/widen.cuh"

namespace wh::cuda {
namespace decode {

template <typename T>
__device__ __forceinline__ float2 load_pair(const void* from) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    return __half22float2(*static_cast<const __half2*>(from));
  } else {
    return __bfloat1622float2(*static_cast<const __nv_bfloat162*>(from));
  }
}

// Weights of codes are counted times 2^7, to 2^15 at most: below 2^-24 f16 loses them, and of a
// million keys beside a heavy one those would be a sixteenth.
constexpr int kLift = 7;

// Two columns of K or V as they are stored, where speed does not matter.
template <typename T>
__device__ __forceinline__ float2 stored_pair(const KvTensor&, const T* at) {
  return load_pair<T>(at);
}
__device__ __forceinline__ float2 stored_pair(const KvTensor& stored, const uint8_t* at) {
  const uint8_t x = at[0], y = at[1];
  if (stored.format == Quantised::kE4m3) return {to_float(E4m3{x}), to_float(E4m3{y})};
  return {static_cast<float>(static_cast<int8_t>(x)), static_cast<float>(static_cast<int8_t>(y))};
}

// The sums of V again, one key at a time and in full precision, of this thread's two rows. Slow,
// and right whatever lies in V: hidden keys are not read. The largest scores are already known.
template <typename Tile, typename T>
__device__ __forceinline__ void redo_sums(float (&o)[Tile::kColumns / 2], const DecodeArgs& args,
                                          const PackedItem& item, const TileSoftmax<T>& softmax,
                                          const float* row_factors, float unit,
                                          const unsigned char* s_q, int first_row,
                                          int first_column) {
  using Key = std::conditional_t<Tile::kWidens, __half, T>;
  const AttentionArgs& a = args.attention;
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < Tile::kColumns / 2; ++i) o[i] = 0;
  const KeyRows rows = item.key_rows(a);
  using KvType = std::conditional_t<Tile::kWidens, uint8_t, T>;
  const auto* k_head = static_cast<const KvType*>(args.k) + item.head_kv * args.stride_k[1];
  const auto* v_head = static_cast<const KvType*>(a.v) + item.head_kv * a.stride_v[1];
  const int32_t begin = max(item.seen.begin, item.tile_begin * Tile::kTileK);
  const int32_t end = min(item.seen.end, item.tile_end * Tile::kTileK);
#pragma unroll 1
  for (int32_t key = begin; key < end; ++key) {
    const KvType* k = k_head + rows.offset(args.stride_k[0], args.stride_k[2], key);
    const KvType* v = v_head + rows.offset(a.stride_v[0], a.stride_v[2], key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float dot[1] = {0};
#pragma unroll 1
      for (int d = column; d < a.dim_qk; d += 8) {
        const float2 x =
            load_pair<Key>(s_q + chunk_offset(first_row + 8 * r, d / 8, Tile::kTileQ) + d % 8 * 2);
        const float2 y = stored_pair(args.stored_k, k + d);
        dot[0] = fmaf(x.x, y.x, fmaf(x.y, y.y, dot[0]));
      }
      dot[0] += __shfl_xor_sync(~0u, dot[0], 1);
      dot[0] += __shfl_xor_sync(~0u, dot[0], 2);
      if constexpr (Tile::kWidens) {
        if (row_factors != nullptr) dot[0] *= row_factors[first_row + 8 * r];
        if (has_token_scales(args.stored_k)) {
          dot[0] *= args.stored_k.scale(place_of_key(rows, item, key), 0);
        }
      }
      if (static_cast<uint32_t>(key - softmax.rows[r].first_key) >= softmax.rows[r].key_count)
        continue;
      const float bias = mask_bias<T>(a, softmax.rows[r], key);
      if (bias == -INFINITY) continue;
      if (args.scores != Scores::kPlain) transform_scores(dot, a);
      float p = softmax.online.weight(dot[0] + bias, r, softmax.scale_log2);
      if constexpr (Tile::kWidens) {
        p *= 1 << kLift;
        if (has_token_scales(args.stored_v)) {
          p *= unit;
          p *= args.stored_v.scale(place_of_key(rows, item, key), 0);
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kColumns / 8; ++i) {
        const int d = first_column + 8 * i + column;
        if (d >= a.dim_v) continue;
        const float2 y = stored_pair(args.stored_v, v + d);
        o[4 * i + 2 * r] = fmaf(p, y.x, o[4 * i + 2 * r]);
        o[4 * i + 2 * r + 1] = fmaf(p, y.y, o[4 * i + 2 * r + 1]);
      }
    }
    __syncwarp();
  }
}

// Whether some sum of some lane of the warp is NaN or infinite.
template <int kCount>
__device__ __forceinline__ bool any_not_finite(const float (&o)[kCount]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) zero = fmaf(o[i], 0.0f, zero);
  return __any_sync(~0u, zero != 0);
}

// What a consumer thread does: its share of two rows' scores and of their sums of V.
template <typename Tile, typename T, Layouts kLayouts>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const DecodeArgs& args, const PackedItem& item,
                                      const Shared<Tile>& shared, unsigned char* smem)
      : args_(args),
        item_(item),
        shared_(shared),
        smem_(smem),
        first_row_(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4),
        first_column_(Tile::kWarpgroups == 1 ? 0 : threadIdx.x / 128 * kColumns),
        softmax_(args.attention, args.scores) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows past the last one follow it, and are not stored
      const PackedRow at(args.attention, args.rows, item, min(first_row_ + 8 * r, item.rows - 1));
      softmax_.rows[r] = score_row(args.attention, item.sequence, at.head, at.query);
    }
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) o_[i] = 0;
    if constexpr (Tile::kWidens) note_row_factors();
    Ring<Tile::kSlots> ring;
    const int32_t kept = keep_item();
#pragma unroll 1
    for (int32_t tile = item_.tile_begin; tile < tile_end(kept); ++tile) work_on(tile, ring, kept);
    recall_item(kept);
    if (item_.is_mixed && any_not_finite(o_)) {
      redo_sums<Tile, T>(o_, args_, item_, softmax_, row_factors(), __uint_as_float(last_unit()),
                         smem_, first_row_, first_column_);
    }
    if constexpr (Tile::kWidens) softmax_.template lower<kLift>();
    if (args_.partials.splits > 1) {
      store_share();
    } else {
      store_rows();
    }
  }

 private:
  static constexpr bool kIsDense = kLayouts == Layouts::kDense;
  static constexpr int kTileK = Tile::kTileK, kColumns = Tile::kColumns;
  // Of both products, of codes whatever the type of q.
  using Key = std::conditional_t<Tile::kWidens, __half, T>;
  static constexpr int kWeightLift = Tile::kWidens ? kLift : 0;

  // Of layouts, the item lies in one register through the loop, of which each lane has its own.
  // Where tensors are dense, it follows from the block's index.
  __device__ __forceinline__ int32_t keep_item() const {
    int32_t kept = 0;
    if (kIsDense) return kept;
    const int32_t all[] = {item_.seen.begin,     item_.seen.end, item_.tiles.full_begin,
                           item_.tiles.full_end, item_.tile_end, item_.sequence.batch_idx,
                           item_.head_kv,        item_.split,    item_.first_row,
                           item_.rows,           item_.is_mixed, item_.tile_begin};
#pragma unroll
    for (int i = 0; i < static_cast<int>(std::size(all)); ++i) {
      if (threadIdx.x % 32 == i) kept = all[i];
    }
    return kept;
  }
  __device__ __forceinline__ int32_t tile_end(int32_t kept) const {
    if constexpr (kIsDense) {
      return item_.tile_end;
    } else {
      return __shfl_sync(~0u, kept, 4);
    }
  }
  // What a tile asks for.
  __device__ __forceinline__ void recall_bounds(int32_t kept) {
    if constexpr (!kIsDense) {
      item_.seen = {__shfl_sync(~0u, kept, 0), __shfl_sync(~0u, kept, 1)};
      item_.tiles.full_begin = __shfl_sync(~0u, kept, 2);
      item_.tiles.full_end = __shfl_sync(~0u, kept, 3);
    }
  }
  __device__ __forceinline__ void recall_item(int32_t kept) {
    if constexpr (!kIsDense) {
      recall_bounds(kept);
      const int32_t batch_idx = __shfl_sync(~0u, kept, 5);
      item_.sequence = sequence_at(args_.attention, batch_idx);
      item_.pages = args_.attention.page_table.of(batch_idx);
      item_.head_kv = __shfl_sync(~0u, kept, 6);
      item_.split = __shfl_sync(~0u, kept, 7);
      item_.first_row = __shfl_sync(~0u, kept, 8);
      item_.rows = __shfl_sync(~0u, kept, 9);
      item_.is_mixed = __shfl_sync(~0u, kept, 10) != 0;
      item_.tile_begin = __shfl_sync(~0u, kept, 11);
      item_.tile_end = tile_end(kept);
    }
  }

  __device__ __forceinline__ void release(int slot) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared_.empty + 8 * slot);
  }

  __device__ __forceinline__ void work_on(int32_t tile, Ring<Tile::kSlots>& ring, int32_t kept) {
    const AttentionArgs& a = args_.attention;
    const int32_t tile_key = tile * kTileK;
    float s[kTileK / 2];
    uint32_t p[kTileK / 4];
    ptx::mbarrier_wait(shared_.full + 8 * ring.slot, ring.parity);
    {
      constexpr int kParts = Tile::kHalvesScores ? 2 : 1;
      constexpr int kPartPanels = Tile::kDimQk / kPanelColumns / kParts;
      const int panel = Tile::kHalvesScores ? threadIdx.x / 128 * kPartPanels : 0;
      const uint64_t q = ptx::panel_descriptor(shared_.q + panel * panel_bytes(Tile::kTileQ));
      const uint64_t k =
          ptx::panel_descriptor(shared_.slot(ring.slot) + panel * panel_bytes(kTileK));
      ptx::keep(s);
      issue_scores<Key, kTileK, Tile::kTileQ, kPartPanels * kPanelSteps>(s, q, k);
      ptx::wgmma_wait<0>();
      ptx::keep(s);
    }
    if constexpr (Tile::kHalvesScores) add_other_half(s);
    if constexpr (Tile::kWidens) {
      if (multiplies_rows_) {
        const float factors[2] = {row_factor(0), row_factor(1)};
#pragma unroll
        for (int i = 0; i < kTileK / 2; ++i) s[i] *= factors[i / 2 % 2];
      }
      if (has_token_scales(args_.stored_k)) multiply_by_scales(s, ring.slot);
      __syncwarp();  // one lane gives the slot back for all
    }
    if (args_.values == Values::kOwn) {
      release(ring.slot);
      ring.next();
    }
    recall_bounds(kept);
    softmax_.raise(s, tile_key, !item_.tiles.is_full(tile));
    softmax_.template weigh<kWeightLift>(s);
    bool in_bf16 = std::is_same_v<Key, __nv_bfloat16>;  // weights and values
    if constexpr (Tile::kWidens) {
      ptx::mbarrier_wait(shared_.full + 8 * ring.slot, ring.parity);
      if (has_token_scales(args_.stored_v)) {
        multiply_by_scales(s, ring.slot);
        in_bf16 = follow_unit(ring.slot);
      }
    }
    if (in_bf16) {
      TileSoftmax<__nv_bfloat16>::pack(s, p);
    } else {
      TileSoftmax<__half>::pack(s, p);
    }
    softmax_.correct(o_);
    if (!Tile::kWidens && args_.values == Values::kOwn) {
      ptx::mbarrier_wait(shared_.full + 8 * ring.slot, ring.parity);
    }
    // Past the end of K and V, TMA has left zeros.
    const bool has_unseen = tile_key < item_.seen.begin ||
                            (tile_key + kTileK > item_.seen.end && item_.seen.end != a.zeros_from);
    if (has_unseen) {
      ptx::named_sync(kConsumersMeet, Tile::kConsumers);
      clear_unseen<Tile>(smem_ + Tile::kQueryBytes + ring.slot * Tile::kSlotBytes, item_.seen,
                         tile_key);
      ptx::async_proxy_fence();
      ptx::named_sync(kConsumersMeet, Tile::kConsumers);
    }
    {
      constexpr int kPanelBytes = panel_bytes(kTileK);
      const uint64_t v = ptx::panel_descriptor(
          shared_.slot(ring.slot) + first_column_ / kPanelColumns * kPanelBytes, kPanelBytes);
      if (in_bf16) {
        add_values<__nv_bfloat16>(p, v);
      } else {
        add_values<__half>(p, v);
      }
    }
    release(ring.slot);
    ring.next();
  }

  // The other warpgroup's scores, of the other columns, to this one's.
  __device__ __forceinline__ void add_other_half(float (&s)[kTileK / 2]) const {
    auto* halves = reinterpret_cast<float4*>(smem_ + Shared<Tile>::halves_offset());
    const auto at = [&](int i, int half) -> float4& {
      return halves[(half * (kTileK / 8) + i) * 128 + threadIdx.x % 128];
    };
    const int own = threadIdx.x / 128;
    ptx::named_sync(kConsumersMeet, Tile::kConsumers);  // those of the last tile are read
#pragma unroll
    for (int i = 0; i < kTileK / 8; ++i) {
      at(i, own) = make_float4(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
    }
    ptx::named_sync(kConsumersMeet, Tile::kConsumers);
#pragma unroll
    for (int i = 0; i < kTileK / 8; ++i) {
      const float4 other = at(i, 1 - own);
      s[4 * i] += other.x;
      s[4 * i + 1] += other.y;
      s[4 * i + 2] += other.z;
      s[4 * i + 3] += other.w;
    }
    __syncwarp();
  }

  // Adds the products of a tile's weights and values, both of type V.
  template <typename V>
  __device__ __forceinline__ void add_values(uint32_t (&p)[kTileK / 4], uint64_t v) {
    ptx::keep(o_);
    ptx::keep(p);
    issue_values<V, kColumns, kTileK / kStepColumns>(o_, p, v);
    ptx::wgmma_wait<0>();
    ptx::keep(o_);
  }

  // What scores of codes are multiplied by (QueryLoader::wait_widened()); none where it is part of
  // the exponent's scale.
  __device__ __forceinline__ const float* row_factors() const {
    if constexpr (Tile::kWidens) {
      if (multiplies_rows_) {
        return reinterpret_cast<const float*>(smem_ + Shared<Tile>::row_factors_offset());
      }
    }
    return nullptr;
  }
  // That of row r of this thread. Kept, they would be two registers that layouts do not leave.
  __device__ __forceinline__ float row_factor(int r) const {
    return row_factors()[first_row_ + 8 * r];
  }
  // The exponent's scale takes a factor that all rows of the warp share, where it stays a positive
  // number of all bits, and scores are not transformed in front of it.
  __device__ __forceinline__ void note_row_factors() {
    multiplies_rows_ = true;
    const float first = __shfl_sync(~0u, row_factor(0), 0);
    const float shared_scale = softmax_.scale_log2 * first;
    bool is_shared = shared_scale >= 0x1p-126f && shared_scale < INFINITY;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      is_shared = is_shared && (first_row_ + 8 * r >= item_.rows || row_factor(r) == first);
    }
    if (args_.scores != Scores::kPlain || !__all_sync(~0u, is_shared)) return;
    multiplies_rows_ = false;
    softmax_.scale_log2 = shared_scale;
  }

  // Scores, or weights, by the scales of the keys of the tile in a slot.
  __device__ __forceinline__ void multiply_by_scales(float (&s)[kTileK / 2], int slot) const {
    const auto* scales =
        reinterpret_cast<const float4*>(smem_ + Shared<Tile>::scales_offset(slot)) +
        threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTileK / 16; ++i) {
      const float4 of = scales[4 * i];
      const float of_pairs[2][2] = {{of.x, of.y}, {of.z, of.w}};
#pragma unroll
      for (int j = 0; j < 8; ++j) s[8 * i + j] *= of_pairs[j / 4][j % 2];
    }
  }
  // Brings the sums of before to the unit of a tile of V with scales of tokens. Returns whether
  // that tile is of bf16.
  __device__ __forceinline__ bool follow_unit(int slot) {
    const auto unit = *reinterpret_cast<const ValueUnit*>(
        smem_ + Shared<Tile>::scales_offset(slot) + Tile::kLoadScaleBytes);
    softmax_.online.correction[0] *= unit.change;
    softmax_.online.correction[1] *= unit.change;
    return unit.in_bf16 != 0;
  }
  // What scales of V's tokens were multiplied by, once all tiles are.
  __device__ __forceinline__ uint32_t last_unit() const {
    if constexpr (Tile::kWidens) {
      return *reinterpret_cast<const uint32_t*>(smem_ + Shared<Tile>::unit_offset());
    } else {
      return kNoUnit;
    }
  }

  // What the sums of row r are still to be multiplied by. Those of codes are normalised here, and
  // then multiplied by the scales of V that all keys share, or brought out of the unit of those of
  // tokens: the other way around they might leave f32.
  __device__ __forceinline__ float factor_of(int r) {
    const float norm = softmax_.norm(r) * (1.0f / (1 << kWeightLift));
    if constexpr (!Tile::kWidens) return norm;
    const KvTensor& v = args_.stored_v;
    const KvPlace head{0, item_.head_kv, 0, item_.sequence.batch_idx};
    // Apart: asked of each column whether it has a scale, sums of 256 took 20 us, nearly all of it
    // for instructions that lie far from each other.
    if (v.scales == Scales::kChannel) {
      multiply_by_channels(r, norm, v.scales_data + v.scale_offset(head));
      return 1;
    }
    const float scale =
        has_token_scales(v) ? __uint_as_float((254u << 23) - last_unit()) : v.scale(head, 0);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& sum = o_[4 * i + 2 * r + e];
        sum = sum * norm * scale;
      }
    }
    return 1;
  }
  __device__ __forceinline__ void multiply_by_channels(int r, float norm, const float* scales) {
    const int64_t stride = args_.stored_v.stride_scales[3];
    const int thread_column = first_column_ + threadIdx.x % 4 * 2;
    const int columns = args_.attention.dim_v - thread_column;  // from this thread's first one on
    const float* at = scales + thread_column * stride;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& sum = o_[4 * i + 2 * r + e];
        sum = sum * norm * (8 * i + e < columns ? at[e * stride] : 1);
      }
      at += 8 * stride;
      asm volatile("" : "+l"(at));  // not counted anew for each column
    }
  }

  // This share of the rows, normalised, for combine.cu. Through shared memory: a row of the
  // accumulators is 32 bytes at a time in a warp's store, and whole in a bulk copy.
  __device__ __forceinline__ void store_share() {
    constexpr int kPitch = kColumns * 4 + 32;  // banks: 4 rows of 32 bytes a half warp
    static_assert(Tile::kTileQ * kPitch * Tile::kWarpgroups <= Tile::kRingBytes);
    const int lane = threadIdx.x % 32;
    RowWeight weights[2];
    // Other warps may still multiply what lies in the ring.
    __syncwarp();
    ptx::named_sync(kConsumersMeet, Tile::kConsumers);
    const int warp_offset = Tile::kQueryBytes + threadIdx.x / 32 * 16 * kPitch;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weights[r] = softmax_.finish(r, -INFINITY);
      const float factor = factor_of(r);
      auto* row = reinterpret_cast<float2*>(smem_ + warp_offset + (lane / 4 + 8 * r) * kPitch);
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        row[4 * i + lane % 4] =
            make_float2(o_[4 * i + 2 * r] * factor, o_[4 * i + 2 * r + 1] * factor);
      }
    }
    ptx::async_proxy_fence();
    __syncwarp();
    // From here on a lane has one of the warp's 16 rows: it asks a thread that knows its weight.
    const auto ask = [&](RowWeight weight) -> RowWeight {
      return {__shfl_sync(~0u, weight.largest, lane % 8 * 4),
              __shfl_sync(~0u, weight.sum, lane % 8 * 4)};
    };
    const RowWeight first_half = ask(weights[0]), second_half = ask(weights[1]);
    const int row = threadIdx.x / 32 % 4 * 16 + lane;
    if (lane >= 16 || row >= item_.rows) return;
    const PackedRow at(args_.attention, args_.rows, item_, row);
    const Partials& partials = args_.partials;
    const int64_t row_of_all = at.index(args_.attention, item_);
    if (first_column_ == 0) {
      partials.weights[row_of_all * partials.splits + item_.split] =
          lane < 8 ? first_half : second_half;
    }
    const int columns = min(kColumns, args_.attention.dim_v - first_column_);
    if (columns <= 0) return;
    // Rows that saw no key too, though they weigh nothing: combine.cu asks for the sums before it
    // knows their weights.
    const int64_t to = item_.split * partials.rows + row_of_all;
    ptx::bulk_store(partials.sums + to * partials.columns + first_column_,
                    shared_.q + warp_offset + lane * kPitch, columns * 4);
    ptx::bulk_commit();
    ptx::bulk_wait();
  }

  // The answer itself.
  __device__ __forceinline__ void store_rows() {
    const AttentionArgs& a = args_.attention;
    const int thread_column = first_column_ + threadIdx.x % 4 * 2;
    const int columns = a.dim_v - thread_column;  // from this thread's first one on
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool exists = first_row_ + 8 * r < item_.rows;
      const PackedRow at(args_.attention, args_.rows, item_, first_row_ + 8 * r);
      const float sink = exists ? sink_of(a, at.head) : -INFINITY;
      const RowWeight weight = softmax_.finish(r, sink);
      const float factor = factor_of(r);
      if (!exists) continue;
      if (softmax_.norm(r) == 0) {  // a row without weight: its sums may be 0 * NaN
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i) o_[4 * i + 2 * r] = o_[4 * i + 2 * r + 1] = 0;
      }
      if (thread_column == 0 && a.log_sum_exp != nullptr) {
        a.log_sum_exp[at.index(a, item_)] = log_sum_exp(weight);
      }
      T* out = static_cast<T*>(a.out) + at.offset(a.stride_out, item_) + thread_column;
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        if (8 * i >= columns) continue;
        *reinterpret_cast<uint32_t*>(out + 8 * i) =
            ptx::pack<T>(o_[4 * i + 2 * r] * factor, o_[4 * i + 2 * r + 1] * factor);
      }
    }
  }

  const DecodeArgs& args_;
  std::conditional_t<kIsDense, const PackedItem&, PackedItem> item_;
  const Shared<Tile>& shared_;
  unsigned char* smem_;
  int first_row_;     // of the thread's two, 8 apart
  int first_column_;  // of the warpgroup's
  TileSoftmax<T> softmax_;
  bool multiplies_rows_;  // of codes, scores by row_factors()
  float o_[kColumns / 2];
};

// One warp: one thread of it fills the ring. The whole warp runs the loops, so that it meets the
// barriers as one: a thread that comes late out of a loop of its own arrives alone. load(n, slot)
// asks for the n-th tile.
template <typename Tile, typename Load>
__device__ __forceinline__ void produce(const TileLoader<Tile>& tiles, Load load) {
  const DecodeArgs& args = tiles.args;
  const int count = tiles.count();
  // The ring is empty: its first tiles are on their way before the block is told of the barriers.
  const int first_count = min(count, Tile::kLoadSlots);
  int n = 0;
  if (args.fresh_keys >= 0) {
    const int old_tiles = max(0, tiles.item.sequence.present.end - args.fresh_keys) / Tile::kTileK;
    for (; n < first_count && tiles.tile(n) < old_tiles; ++n) {
      load(n, n);
    }
  }
  __syncwarp();
  ptx::wait_for_dependency();
  ptx::named_sync(kQueriesRequested, Tile::kConsumers + 32);
  for (; n < first_count; ++n) {
    load(n, n);
    __syncwarp();
  }
  meet_block<Tile>();
  Ring<Tile::kLoadSlots> ring;
  for (; n < count; ++n) {
    ptx::mbarrier_wait(tiles.shared.loads_empty + 8 * ring.slot, ring.parity);
    load(n, ring.slot);
    ring.next();
  }
}

template <typename Tile, Layouts kLayouts>
__device__ __forceinline__ void produce(const TileLoader<Tile>& tiles) {
  if (kLayouts == Layouts::kDense || tiles.item.pages == nullptr) {
    produce(tiles, [&](int n, int slot) { tiles.load(n, slot); });
    return;
  }
  BoxPages pages(tiles.args, tiles.item, tiles.item.tile_begin * Tile::kTileK);
  produce(tiles, [&](int n, int slot) { tiles.load(n, slot, pages); });
}

template <typename Tile, typename T, Layouts kLayouts>
__device__ __forceinline__ void consume(const DecodeArgs& args, const BlockItem& block,
                                        const Shared<Tile>& shared, unsigned char* smem) {
  // Where a lone warpgroup of consumers stands beside two of others, its registers do not suffice
  // for what comes first either.
  if constexpr (Tile::kWidens) ptx::registers_take<Tile::consumer_registers(kLayouts)>();
  Consumer<Tile, T, kLayouts> consumer(args, block.item, shared, smem);
  {
    QueryLoader<Tile, T> queries(args, block.item);
    ptx::wait_for_dependency();
    queries.request(shared.q);
    __syncwarp();
    ptx::named_arrive(kQueriesRequested, Tile::kConsumers + 32);
    if constexpr (Tile::kWidens) {
      auto* factors = reinterpret_cast<float*>(smem + Shared<Tile>::row_factors_offset());
      const KvTensor& k = args.stored_k;
      const KvPlace head{0, block.item.head_kv, 0, block.item.sequence.batch_idx};
      queries.wait_widened(smem, factors, has_token_scales(k) ? 1 : k.scale(head, 0));
    } else {
      queries.wait();
    }
  }
  meet_block<Tile>();
  if constexpr (kLayouts == Layouts::kAll) weigh_missing<Tile::kConsumers>(args, block);
  if constexpr (!Tile::kWidens && Tile::kWarpgroups == 2) {
    ptx::registers_take<DecodeRegisters<kLayouts>::kConsumer>();
  }
  consumer.run();
}

}  // namespace decode

template <typename Tile, typename T, Layouts kLayouts>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    sm90_decode(const __grid_constant__ DecodeMaps maps, const __grid_constant__ DecodeArgs args) {
  using namespace decode;
  extern __shared__ __align__(1024) unsigned char smem[];
  const Shared<Tile> shared(smem);
  if (threadIdx.x == Tile::kConsumers) {
    for (int i = 0; i < Tile::kSlots; ++i) {
      ptx::mbarrier_init(shared.full + 8 * i, widening_warps<Tile>());
      ptx::mbarrier_init(shared.empty + 8 * i, Tile::kConsumers / 32);
    }
    if constexpr (Tile::kWidens) {
      for (int i = 0; i < Tile::kLoadSlots; ++i) {
        ptx::mbarrier_init(shared.loads_full + 8 * i, 1 + 32);  // and who asks for scales
        ptx::mbarrier_init(shared.loads_empty + 8 * i, widening_warps<Tile>());
      }
    }
    if constexpr (Tile::kWidens) {
      *reinterpret_cast<uint32_t*>(smem + Shared<Tile>::unit_offset()) = kNoUnit;
    }
    ptx::mbarrier_init_fence();
    if (args.attention.len_k > 0) {
      ptx::tma_prefetch(&maps.k);
      ptx::tma_prefetch(&maps.v);
    }
  }
  __syncwarp();
  constexpr bool kIsDense = kLayouts == Layouts::kDense;
  using Registers = DecodeRegisters<kLayouts>;
  // Nothing that the kernel in front may have written is read before it has ended.
  const bool reads_lengths =
      args.attention.key_lengths != nullptr || args.attention.key_starts != nullptr ||
      (!kIsDense &&
       (args.attention.query_offsets != nullptr || args.attention.key_offsets != nullptr));
  if (reads_lengths && args.fresh_keys < 0) ptx::wait_for_dependency();
  // Whoever waits for this kernel's end relies on that of the one in front too.
  const Share share = block_share<Tile, kLayouts>(args);
  if (!kIsDense && share.batch_idx < 0) {
    ptx::wait_for_dependency();
    return;
  }
  const BlockItem block = block_item<Tile, kLayouts>(args, share);
  const PackedItem& item = block.item;
  if (!kIsDense && item.rows <= 0) {
    ptx::wait_for_dependency();
    return;
  }
  if (threadIdx.x < Tile::kConsumers) {
    consume<Tile, T, kLayouts>(args, block, shared, smem);
    return;
  }
  if constexpr (Tile::kWidens) {
    ptx::registers_give<Tile::supply_registers(kLayouts)>();
  } else if constexpr (Tile::kWarpgroups == 2) {
    ptx::registers_give<Registers::kProducer>();
  }
  if (threadIdx.x < Tile::kConsumers + 32) {
    produce<Tile, kLayouts>({maps, args, item, shared, threadIdx.x == Tile::kConsumers});
  } else if constexpr (Tile::kWidens) {
    meet_block<Tile>();
    Widener<Tile>(args, item, shared, smem).run();
  } else {
    meet_block<Tile>();
  }
}

template <int kDimQk, int kDimV, Dtype kDtype, Layouts kLayouts>
const void* decode_instance() {
  return reinterpret_cast<const void*>(
      &sm90_decode<DecodeTile<kDimQk, kDimV>, Element<kDtype>, kLayouts>);
}
template <int kDimQk, int kDimV, Dtype kDtype, Layouts kLayouts>
const void* decode_code_instance() {
  return reinterpret_cast<const void*>(
      &sm90_decode<DecodeCodeTile<kDimQk, kDimV>, Element<kDtype>, kLayouts>);
}

}  // namespace wh::cuda
