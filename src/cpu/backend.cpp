#include "cpu/backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "core/carver.h"
#include "core/rounding.h"
#include "cpu/common/append.h"
#include "cpu/common/partial.h"
#include "cpu/cpu_facts.h"
#include "cpu/registry.h"

namespace wh::cpu {
namespace {

constexpr std::align_val_t kAlignment{kWorkspaceAlignment};
// What a task of a merge or of an append reads: enough that handing it out does not count.
constexpr int64_t kTaskElements = 1 << 16;

// Calls body(begin, end) for pieces of `rows` of so many elements each.
template <typename Body>
void parallel_rows(const Executor& executor, int64_t rows, int64_t row_elements, const Body& body) {
  const int64_t task_rows = std::max<int64_t>(1, kTaskElements / row_elements);
  const int64_t tasks = divide_up(rows, task_rows);
  // Tasks are numbered in 32 bits; of the rest each takes several.
  const auto workers = static_cast<int32_t>(std::min<int64_t>(tasks, 1 << 20));
  parallel(executor, workers, [&](int32_t worker) {
    const auto begin_of = [&](int64_t i) {
      return std::min(rows, tasks * i / workers * task_rows);
    };
    body(begin_of(worker), begin_of(worker + 1));
  });
}

class CpuBackend final : public Backend {
 public:
  const char* label() const override { return "the CPU"; }

  std::span<const Kernel* const> kernels() const override { return cpu::kernels(); }

  const DeviceFacts& facts(int32_t) const override { return cpu_facts(); }
  void write_facts(int32_t, JsonWriter& json) const override {
    const CpuFacts& cpu = cpu_facts();
    json.write("name", cpu.name);
    json.write("isa", cpu.isa);
    json.write("avx512_bf16", cpu.has_avx512_bf16);
    json.write("cores", cpu.cores);
    json.write("l2_bytes", cpu.l2_bytes);
    json.write("gflops_per_core", cpu.gflops_per_core);
    json.write("read_gbytes_per_s", cpu.read_gbytes_per_s);
  }
  ProfileIdentity identity(int32_t) const override {
    const CpuFacts& cpu = cpu_facts();
    // Hypervisors hide the model: "AMD EPYC" is a Zen 4, of family 25, or a Zen 5, twice as fast.
    const std::string family = cpu.family.empty() ? "" : ", family " + cpu.family;
    return {cpu.name + family, cpu.isa, "", cpu.cores, ""};
  }

  bool is_host() const override { return true; }

  Result<void*> allocate(DeviceStream, size_t bytes) const override {
    void* data = ::operator new(bytes, kAlignment, std::nothrow);
    if (data != nullptr) return data;
    return Status(Code::kOutOfMemory, fmt::format("no memory for {} bytes of workspace", bytes));
  }
  void release(DeviceStream, void* data) const noexcept override {
    ::operator delete(data, kAlignment);
  }
  Status copy(DeviceStream, void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
    return {};
  }
  Status write(DeviceStream, void* to, std::span<const int32_t> numbers) const override {
    std::memcpy(to, numbers.data(), numbers.size_bytes());
    return {};
  }
  Status copy(DeviceStream, const TensorCopy& copy, const Executor& executor) const override {
    const auto& e = copy.extents;
    const bool is_row = copy.stride_to[3] == 1 && copy.stride_from[3] == 1;
    const int64_t pieces = is_row ? 1 : e[3];
    const auto bytes = static_cast<size_t>((is_row ? e[3] : 1) * copy.element_bytes);
    const auto copy_row = [&](int64_t b, int64_t h, int64_t i) {
      const auto offset = [&](const Strides& s) { return b * s[0] + h * s[1] + i * s[2]; };
      const int64_t to = offset(copy.stride_to), from = offset(copy.stride_from);
      for (int64_t d = 0; d < pieces; ++d) {
        std::memcpy(
            static_cast<std::byte*>(copy.to) + (to + d * copy.stride_to[3]) * copy.element_bytes,
            static_cast<const std::byte*>(copy.from) +
                (from + d * copy.stride_from[3]) * copy.element_bytes,
            bytes);
      }
    };
    const auto workers = static_cast<int32_t>(std::min<int64_t>(e[2], 1 << 20));
    parallel(executor, workers, [&](int32_t worker) {
      for (int64_t i = worker; i < e[2]; i += workers) {
        for (int64_t b = 0; b < e[0]; ++b) {
          for (int64_t h = 0; h < e[1]; ++h) copy_row(b, h, i);
        }
      }
    });
    return {};
  }
  Status synchronize(DeviceStream) const override { return {}; }

  Status check(const Problem&, const Tensors&, void*) const override { return {}; }
  Status run(const Kernel& kernel, const Launch& launch) const override {
    return kernel.run(launch);
  }
  Status merge(const OutputMerge& merge, const Executor& executor, DeviceStream) const override {
    const auto parts = std::max<int64_t>(1, static_cast<int64_t>(merge.parts.size()));
    parallel_rows(executor, merge.rows(), merge.extents[3] * parts,
                  [&](int64_t begin, int64_t end) { merge_outputs(merge, begin, end); });
    return {};
  }
  Status append(const KvAppend& append, const Executor& executor, DeviceStream) const override {
    parallel_rows(executor, append.tokens, append.heads_kv * append.of[0].stored.dim,
                  [&](int64_t begin, int64_t end) { append_tokens(append, begin, end); });
    return {};
  }
  Result<std::unique_ptr<Replay>> capture(
      int32_t, const std::function<Status(void* stream)>&) const override {
    return Status(Code::kRefused, "the CPU has no streams to capture");
  }
};

}  // namespace

const Backend& backend() {
  static const CpuBackend the;
  return the;
}

}  // namespace wh::cpu
