// Line charts as SVG: a line a series, logarithmic axes, no dependencies.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace wh::cli {

// What an axis counts, and so where its ticks are and what they are called.
enum class Unit : uint8_t { kNumber, kKeys, kMicroseconds };

struct Series {
  std::string name;
  std::vector<std::pair<double, double>> points;  // positive
};

struct Chart {
  std::string title, x_label, y_label;
  Unit x_unit = Unit::kNumber, y_unit = Unit::kNumber;
  std::vector<Series> series;
  double level = 0;  // a line across at this y; 0: none
};

// Series without points are left out; a chart without any is only its title.
std::string to_svg(const Chart& chart);

}  // namespace wh::cli
