#include "measure/probe_bf16.h"

#include <immintrin.h>

namespace wh::cli {

float bf16_products(int64_t repetitions) {
  // As many chains as multiply_add() has: two pipes of six cycles need twelve.
  __m512 chain[kBf16Chains];
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  for (int i = 0; i < kBf16Chains; ++i) chain[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t r = 0; r < repetitions; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kBf16Chains; ++i) chain[i] = _mm512_dpbf16_ps(chain[i], ones, ones);
  }
  __m512 sum = chain[0];
  for (int i = 1; i < kBf16Chains; ++i) sum = _mm512_add_ps(sum, chain[i]);
  return _mm512_cvtss_f32(sum);
}

}  // namespace wh::cli
