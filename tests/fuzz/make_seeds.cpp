// Writes valid inputs for the fuzzers into the folders problem, plan_json, merge, append and
// safetensors.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "widehead/widehead.h"

namespace {

void write(const std::string& path, const void* data, size_t size) {
  std::ofstream(path, std::ios::binary)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
}

}  // namespace

int main() {
  for (const char* folder : {"problem", "plan_json", "merge", "append", "safetensors"}) {
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
    problem.mask = i % 4;
    if (i >= 4) {  // e4m3 and q8_0 where rows are whole blocks, int8 elsewhere
      problem.quantised_k = problem.dim_qk % 32 == 0 ? WH_Q8_0 : WH_INT8;
      problem.quantised_v = WH_E4M3;
      problem.scales_k = problem.quantised_k == WH_INT8 ? i % 5 : 0;
      problem.scales_v = 1 + i % 4;
    }
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
    wh_appended appended;
    wh_appended_init(&appended, sizeof(appended));
    appended.tokens = 1 + i;
    appended.dtype = i % 3;
    const int64_t rows[] = {problem.heads_kv * problem.dim_qk, problem.dim_qk, 1};
    std::memcpy(appended.stride_new_k, rows, sizeof(rows));
    std::memcpy(appended.stride_new_v, rows, sizeof(rows));
    char both[sizeof(problem) + sizeof(appended) + 8];
    std::memcpy(both, &problem, sizeof(problem));
    std::memcpy(both + sizeof(problem), &appended, sizeof(appended));
    std::memset(both + sizeof(problem) + sizeof(appended), 4 * i, 8);  // slots
    write("append/" + std::to_string(i), both, sizeof(both));
  }
  for (int i = 0; i < 3; ++i) {
    wh_merged merged;
    wh_merged_init(&merged, sizeof(merged));
    merged.dtype = i;
    merged.heads_q = merged.len_q = 4;
    merged.batch = merged.dim_v = 1 + i;
    const int64_t strides[] = {16 * merged.dim_v, 4 * merged.dim_v, merged.dim_v, 1};
    std::memcpy(merged.stride_out, strides, sizeof(strides));
    const int64_t steps[] = {16, 4, 1};
    std::memcpy(merged.stride_log_sum_exp, steps, sizeof(steps));
    wh_partial parts[3]{};
    for (wh_partial& part : parts) {
      part.dtype = i;
      std::memcpy(part.stride_out, strides, sizeof(strides));
      std::memcpy(part.stride_log_sum_exp, steps, sizeof(steps));
    }
    char bytes[sizeof(merged) + sizeof(parts)];
    std::memcpy(bytes, &merged, sizeof(merged));
    std::memcpy(bytes + sizeof(merged), parts, sizeof(parts));
    write("merge/" + std::to_string(i), bytes, sizeof(bytes));
  }
  const std::string headers[] = {
      R"({"__metadata__":{"scale":"1"},"q":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}})",
      R"({"__metadata__":{"scale":"0.5","softcap":"20","causal":"bottom_right","window_left":"3"},)"
      R"("q":{"dtype":"F32","shape":[1,2,1,2],"data_offsets":[0,16]},)"
      R"("k":{"dtype":"F16","shape":[1,1,3,2],"data_offsets":[16,28]},)"
      R"("v":{"dtype":"F16","shape":[1,1,3,1],"data_offsets":[28,34]},)"
      R"("mask":{"dtype":"U8","shape":[1,1,1,3],"data_offsets":[34,37]},)"
      R"("sinks":{"dtype":"F32","shape":[2],"data_offsets":[37,45]},)"
      R"("key_lengths":{"dtype":"I32","shape":[1],"data_offsets":[45,49]},)"
      R"("key_starts":{"dtype":"I32","shape":[1],"data_offsets":[49,53]},)"
      R"("out":{"dtype":"F32","shape":[1,2,1,1],"data_offsets":[53,61]},)"
      R"("log_sum_exp":{"dtype":"F32","shape":[1,2,1],"data_offsets":[61,69]}})",
      R"({"q":{"dtype":"U8","shape":[0],"data_offsets":)" + std::string(500, '[') +
          std::string(500, ']') + "}}",
  };
  for (size_t i = 0; i < std::size(headers); ++i) {
    const uint64_t length = headers[i].size();
    std::string file(reinterpret_cast<const char*>(&length), 8);
    file += headers[i] + std::string(69, '\0');
    write("safetensors/" + std::to_string(i), file.data(), file.size());
  }
}
