// Kernels keep scores in base 2, where the exponential is cheaper: 2^(s * log2(e)) = e^s.
#pragma once

#include "core/problem.h"

namespace wh::cpu {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// What queries are multiplied by. With a softcap the conversion must wait until after tanh.
inline float query_scale(const Problem& problem) {
  return problem.softcap > 0 ? problem.scale / problem.softcap : problem.scale * kLog2e;
}

}  // namespace wh::cpu
