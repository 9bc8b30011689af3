// The data files that the build put into the program.
#pragma once

#include <nlohmann/json.hpp>

namespace wh::cli {

using Json = nlohmann::ordered_json;

const Json& models();  // data/models.json, without its _about
const Json& suites();  // bench/suites.json

}  // namespace wh::cli
