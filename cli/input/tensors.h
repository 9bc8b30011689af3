// The tensors of a request: random ones, or those of a file.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "input/problem_flags.h"
#include "input/safetensors.h"

namespace wh::cli {

// Host memory on 64-byte boundaries, not initialised: a GB of zeros takes longer than a run.
class HostBuffer {
 public:
  HostBuffer() = default;
  explicit HostBuffer(size_t bytes);

  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Release {
    void operator()(std::byte* data) const;
  };
  std::unique_ptr<std::byte, Release> data_;
  size_t size_ = 0;
};

// What a run reads and writes. Inputs may live in a mapped file instead of a buffer.
struct HostTensors {
  HostBuffer q, k, v, out, mask, sinks, log_sum_exp;
  std::vector<int32_t> key_lengths, key_starts;
  Tensors tensors;

  size_t bytes() const;  // of the buffers
};

// N(0, 1) data, and a mask that hides a quarter of the keys.
HostTensors random_tensors(const Request& request, uint64_t seed);

// A problem from a file: shapes and types from its tensors, options from its metadata or, over
// them, from flags.
struct StoredProblem {
  MappedFile file;  // what `tensors` point into
  Request request;
  HostTensors tensors;
  // The answer stored beside the inputs, if any: f32, [batch, heads_q, len_q, dim_v].
  std::optional<StoredTensor> out, log_sum_exp;
};
Result<StoredProblem> read_problem_file(const std::string& path, const ProblemFlags& options);
// The same without a file of its own: `view` must outlive the answer.
Result<StoredProblem> read_problem(const SafetensorsView& view, const ProblemFlags& options);

// One element of a tensor.
float load_float(const void* data, Dtype dtype, int64_t i);

// out of `tensors` as floats, in order.
std::vector<float> read_out(const Problem& problem, const HostTensors& tensors);

}  // namespace wh::cli
