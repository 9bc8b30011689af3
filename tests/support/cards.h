// Cards that are not there, to plan for.
#pragma once

#include "cuda/known_cards.h"

namespace wh {

inline CudaFacts card(int32_t compute_capability, int64_t shared_bytes) {
  CudaFacts facts;
  facts.name = "a card";
  facts.compute_capability = compute_capability;
  facts.sms = 100;
  facts.shared_bytes = shared_bytes;
  facts.tensor_tflops = 300;
  facts.read_gbytes_per_s = 1000;
  return facts;
}
inline CudaFacts ampere() { return card(80, 166912); }
inline CudaFacts ada() { return card(89, 101376); }

inline CudaFacts h100() { return known_cards()[0].facts; }
inline CudaFacts h200() { return known_cards()[1].facts; }

}  // namespace wh
