// Writes valid inputs for the fuzzers into the folders problem, plan_json and safetensors.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "widehead/widehead.h"

namespace {

void write(const std::string& path, const void* data, size_t size) {
  std::ofstream(path, std::ios::binary)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
}

}  // namespace

int main() {
  for (const char* folder : {"problem", "plan_json", "safetensors"}) {
    std::filesystem::create_directories(folder);
  }
  for (int i = 0; i < 8; ++i) {
    wh_problem problem;
    wh_limits limits;
    wh_problem_init(&problem, sizeof(problem));
    wh_limits_init(&limits, sizeof(limits));
    problem.heads_q = 2 + 2 * (i % 2);
    problem.heads_kv = 2;
    problem.len_q = 1 + 7 * (i % 3);
    problem.len_k = 30;
    problem.dim_qk = problem.dim_v = 8 * (1 + i % 4);
    problem.dtype_q = problem.dtype_kv = i % 3;
    problem.causal = i % 3;
    problem.window_left = i % 2 == 0 ? WH_UNLIMITED : 5;
    problem.uses = static_cast<uint32_t>(i);
    wh_problem_set_dense(&problem);
    char bytes[sizeof(problem) + sizeof(limits)];
    std::memcpy(bytes, &problem, sizeof(problem));
    std::memcpy(bytes + sizeof(problem), &limits, sizeof(limits));
    write("problem/" + std::to_string(i), bytes, sizeof(bytes));
    wh_plan* plan = nullptr;
    if (wh_plan_create(&problem, &limits, &plan) != WH_OK) return 1;
    const std::string json = wh_plan_json(plan);
    write("plan_json/" + std::to_string(i), json.data(), json.size());
    wh_plan_destroy(plan);
  }
  const std::string header =
      R"({"__metadata__":{"scale":"1"},"q":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}})";
  const uint64_t length = header.size();
  std::string file(reinterpret_cast<const char*>(&length), 8);
  file += header + std::string(4, '\1');
  write("safetensors/0", file.data(), file.size());
}
