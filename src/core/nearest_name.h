// "Did you mean ...?" for names of kernels, models and suites.
#pragma once

#include <string>
#include <vector>

namespace wh {

// The entry of `names` with the smallest edit distance; the first of equals; "" of none.
std::string nearest_name(const std::string& wanted, const std::vector<std::string>& names);

}  // namespace wh
