// The two products of attention with VDPBF16PS. products.cpp is compiled with its own flags and
// must be entered only where CpuFacts::has_avx512_bf16 says so; it includes nothing with inline
// functions, so that no AVX-512 copy of one can end up in the rest of the program.
//
// A pair is a dword of two neighbouring bf16: of head dimensions in Q and K, of keys in P and V.
// The instruction multiplies pairs and adds both products to an f32. It flushes denormal inputs and
// results to zero.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace wh::cpu {

constexpr int kBf16Lanes = 16;  // queries of a vector

struct Bf16Scores {
  const float* q;     // [pairs, vectors * 16] pairs
  const uint16_t* k;  // [keys] rows of `pairs` pairs, k_stride elements apart, in place
  ptrdiff_t k_stride;
  int64_t keys, pairs;
  float scale;
  float* s;  // [keys, vectors * 16]: scale * K Q^T
};
void bf16_scores(const Bf16Scores& operands, int vectors);

struct Bf16Values {
  const float* p;      // [key_pairs, vectors * 16] pairs of weights
  const float* p_low;  // the same, what rounding took from p; null: nothing
  const float* v;      // [key_pairs] rows of `columns` pairs, v_stride dwords apart
  ptrdiff_t v_stride;
  int64_t key_pairs, columns;  // columns: a multiple of 8
  const float* alpha;          // [vectors * 16]
  float* o;                    // [columns, vectors * 16]: alpha * o + V^T P^T
};
void bf16_values(const Bf16Values& operands, int vectors);

}  // namespace wh::cpu
