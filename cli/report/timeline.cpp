#include "report/timeline.h"

#include <fmt/format.h>

#include <algorithm>

#include "plan/units.h"

namespace wh::cli {
namespace {

constexpr double kWidth = 900, kLeft = 90, kRight = 20, kTop = 60, kRow = 16, kRank = 44;

// Told apart by people who do not see red and green differently (Okabe and Ito 2008).
const char* color_of(const sharded::Activity& activity) {
  if (activity.is_message) return "#56b4e9";
  if (activity.label == "attend") return "#0072b2";
  return activity.label == "merge" ? "#d55e00" : "#e69f00";
}

}  // namespace

std::string timeline_svg(const std::string& title, const sharded::Simulation& simulation,
                         int32_t ranks) {
  const double height = kTop + kRank * ranks + 50;
  const double scale = (kWidth - kLeft - kRight) / std::max(1e-9, simulation.us);
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" "
      "height=\"{1}\" font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
      "<text x=\"{2}\" y=\"20\" font-size=\"14\">{3}</text>\n",
      kWidth, height, kLeft, title);
  struct Legend {
    const char *color, *text;
  };
  constexpr Legend kLegend[] = {{"#0072b2", "attention"},
                                {"#d55e00", "merge"},
                                {"#e69f00", "copy"},
                                {"#56b4e9", "messages that arrive"}};
  double x = kLeft;
  for (const Legend& each : kLegend) {
    svg += fmt::format("<rect x=\"{}\" y=\"32\" width=\"12\" height=\"12\" fill=\"{}\"/>", x,
                       each.color);
    svg += fmt::format("<text x=\"{}\" y=\"42\">{}</text>\n", x + 16, each.text);
    x += 110;
  }
  for (int32_t rank = 0; rank < ranks; ++rank) {
    svg +=
        fmt::format("<text x=\"10\" y=\"{:.0f}\">rank {}</text>\n", kTop + kRank * rank + 22, rank);
  }
  for (const sharded::Activity& activity : simulation.activities) {
    const double width = (activity.end_us - activity.begin_us) * scale;
    if (width < 0.05) continue;  // nobody would see it
    svg += fmt::format(
        "<rect x=\"{:.2f}\" y=\"{:.0f}\" width=\"{:.2f}\" height=\"{:.0f}\" fill=\"{}\" "
        "stroke=\"white\" stroke-width=\"0.3\"><title>{}: {}</title></rect>\n",
        kLeft + activity.begin_us * scale,
        kTop + kRank * activity.rank + (activity.is_message ? kRow + 2 : 0), width, kRow,
        color_of(activity), activity.label, format_us(activity.end_us - activity.begin_us));
  }
  const double bottom = kTop + kRank * ranks;
  svg += fmt::format("<path d=\"M{} {:.0f}H{}\" stroke=\"black\"/>\n", kLeft, bottom + 4,
                     kWidth - kRight);
  for (int i = 0; i <= 4; ++i) {
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.0f}\" text-anchor=\"{}\">{}</text>\n",
                       kLeft + (kWidth - kLeft - kRight) * i / 4, bottom + 20,
                       i == 0 ? "start" : (i == 4 ? "end" : "middle"),
                       format_us(simulation.us * i / 4));
  }
  return svg + "</svg>\n";
}

}  // namespace wh::cli
