#include "report/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "plan/units.h"

namespace wh::cli {
namespace {

constexpr double kWidth = 840, kLeastHeight = 420;
constexpr double kLeft = 80, kRight = 280, kTop = 50, kBottom = 60;
constexpr double kLegendLine = 18;
// Told apart by people who do not see red and green differently (Okabe and Ito 2008). Past the
// sixth line they come again, dashed.
constexpr const char* kColors[] = {"#0072b2", "#d55e00", "#009e73",
                                   "#cc79a7", "#e69f00", "#56b4e9"};

std::string escape(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '<') {
      escaped += "&lt;";
    } else if (c == '&') {
      escaped += "&amp;";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

// A logarithmic axis that ends at the ticks next to the values seen. Numbers have ticks at 1, 2 and
// 5 times a power of ten, lengths at powers of two.
class Axis {
 public:
  Axis(Unit unit, double low, double high, double from, double to)
      : unit_(unit), from_(from), to_(to) {
    int64_t first = 0, last = 0;
    while (tick(first) > low) --first;
    while (tick(first + 1) <= low) ++first;
    last = first + 1;
    while (tick(last) < high) ++last;
    // At most about nine labels: of numbers over many decades the powers of ten alone.
    step_ = (last - first + 8) / 9;
    if (unit != Unit::kKeys && step_ > 1) {
      step_ = (step_ + 2) / 3 * 3;
      first -= ((first % 3) + 3) % 3;
    }
    first_ = first;
    last_ = last;
  }
  double position(double value) const {
    const double low = std::log(tick(first_));
    return from_ + (std::log(value) - low) / (std::log(tick(last_)) - low) * (to_ - from_);
  }
  std::vector<double> ticks() const {
    std::vector<double> values;
    for (int64_t i = first_; i <= last_; i += step_) values.push_back(tick(i));
    return values;
  }
  std::string label(double value) const {
    if (unit_ == Unit::kMicroseconds) return format_us(value);
    const double kilo = unit_ == Unit::kKeys ? 1024 : 1000;
    if (value >= kilo * kilo) return fmt::format("{:g}M", value / kilo / kilo);
    if (value >= kilo) return fmt::format("{:g}K", value / kilo);
    return fmt::format("{:g}", value);
  }

 private:
  double tick(int64_t i) const {
    if (unit_ == Unit::kKeys) return std::exp2(static_cast<double>(i));
    const int64_t decade = (i >= 0 ? i : i - 2) / 3;
    constexpr double kSteps[] = {1, 2, 5};
    return kSteps[i - 3 * decade] * std::pow(10, static_cast<double>(decade));
  }

  Unit unit_;
  double from_, to_;
  int64_t first_, last_, step_;
};

std::string text_at(double x, double y, const char* anchor, const std::string& text) {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>\n", x, y, anchor,
                     escape(text));
}

}  // namespace

std::string to_svg(const Chart& chart) {
  const double height = std::max(
      kLeastHeight, kTop + kBottom + kLegendLine * static_cast<double>(chart.series.size()));
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" "
      "height=\"{1}\" font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
      kWidth, height);
  svg += fmt::format("<text x=\"{}\" y=\"28\" font-size=\"15\">{}</text>\n", kLeft,
                     escape(chart.title));
  double x_low = std::numeric_limits<double>::infinity(), y_low = x_low, x_high = 0, y_high = 0;
  for (const Series& series : chart.series) {
    for (const auto& [x, y] : series.points) {
      x_low = std::min(x_low, x);
      x_high = std::max(x_high, x);
      y_low = std::min(y_low, y);
      y_high = std::max(y_high, y);
    }
  }
  if (chart.level > 0) {
    y_low = std::min(y_low, chart.level);
    y_high = std::max(y_high, chart.level);
  }
  if (x_high <= 0 || y_high <= 0 || x_low <= 0 || y_low <= 0) return svg + "</svg>\n";
  const Axis x_axis(chart.x_unit, x_low, x_high, kLeft, kWidth - kRight);
  const Axis y_axis(chart.y_unit, y_low, y_high, height - kBottom, kTop);
  for (const double tick : x_axis.ticks()) {
    const double x = x_axis.position(tick);
    svg +=
        fmt::format("<path d=\"M{0:.1f} {1} V{2}\" stroke=\"#ddd\"/>\n", x, kTop, height - kBottom);
    svg += text_at(x, height - kBottom + 18, "middle", x_axis.label(tick));
  }
  for (const double tick : y_axis.ticks()) {
    const double y = y_axis.position(tick);
    svg +=
        fmt::format("<path d=\"M{0} {1:.1f} H{2}\" stroke=\"#ddd\"/>\n", kLeft, y, kWidth - kRight);
    svg += text_at(kLeft - 8, y + 4, "end", y_axis.label(tick));
  }
  svg += text_at((kLeft + kWidth - kRight) / 2, height - 18, "middle", chart.x_label);
  svg += fmt::format(
      "<text transform=\"translate(20 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
      (kTop + height - kBottom) / 2, escape(chart.y_label));
  if (chart.level > 0) {
    svg += fmt::format("<path d=\"M{0} {1:.1f} H{2}\" stroke=\"black\"/>\n", kLeft,
                       y_axis.position(chart.level), kWidth - kRight);
  }
  double legend_y = kTop + 10;
  size_t index = 0;
  for (const Series& series : chart.series) {
    if (series.points.empty()) continue;
    const char* color = kColors[index % std::size(kColors)];
    const char* dash = index++ < std::size(kColors) ? "" : " stroke-dasharray=\"5 3\"";
    std::string path;
    for (const auto& [x, y] : series.points) {
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : " L", x_axis.position(x),
                          y_axis.position(y));
      svg += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"{}\"/>\n",
                         x_axis.position(x), y_axis.position(y), color);
    }
    svg += fmt::format("<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{}/>\n", path,
                       color, dash);
    svg += fmt::format("<path d=\"M{:.1f} {:.1f} h20\" stroke=\"{}\" stroke-width=\"2\"{}/>\n",
                       kWidth - kRight + 12, legend_y - 4, color, dash);
    svg += text_at(kWidth - kRight + 38, legend_y, "start", series.name);
    legend_y += kLegendLine;
  }
  return svg + "</svg>\n";
}

}  // namespace wh::cli
