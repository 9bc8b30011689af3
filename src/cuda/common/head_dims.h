#pragma once

namespace wh::cuda {

// A pair of head dimensions that a kernel is compiled for. Smaller ones run in it too, with zeros
// in the columns they lack.
struct HeadDims {
  int dim_qk, dim_v;
  constexpr bool operator==(const HeadDims&) const = default;
};

}  // namespace wh::cuda
