// The formats of quantised keys and values.
#pragma once

#include "core/problem.h"

namespace wh {

struct StoredFormat {
  Quantised format;
  Scales scales;
};

// Every format with every kind of scales that it may have.
inline constexpr StoredFormat kStoredFormats[] = {
    {Quantised::kE4m3, Scales::kNone},      {Quantised::kE4m3, Scales::kTensor},
    {Quantised::kE4m3, Scales::kHead},      {Quantised::kE4m3, Scales::kTokenHead},
    {Quantised::kE4m3, Scales::kChannel},   {Quantised::kInt8, Scales::kNone},
    {Quantised::kInt8, Scales::kTensor},    {Quantised::kInt8, Scales::kHead},
    {Quantised::kInt8, Scales::kTokenHead}, {Quantised::kInt8, Scales::kChannel},
    {Quantised::kQ8_0, Scales::kNone},      {Quantised::kQ4_0, Scales::kNone}};

}  // namespace wh
