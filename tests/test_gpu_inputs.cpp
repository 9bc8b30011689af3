// Bad input on a GPU: an error that says which pointer, stream or size is wrong, before any launch.
#include <algorithm>

#include "support/gpu_attention.h"

namespace wh {
namespace {

class GpuInputs : public GpuKernel {};

// Runs with `tensors` while the stream is captured: what a call launches shows as nodes of a graph.
void expect_error(GpuAttention& attention, const wh_tensors& tensors,
                  const std::vector<std::string>& words) {
  attention.out.fill(0xff);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), cudaSuccess);
  const wh_status status = attention.run(tensors, stream);
  const std::string message = wh_last_error();
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  size_t nodes = 0;
  ASSERT_EQ(cudaGraphGetNodes(graph, nullptr, &nodes), cudaSuccess);
  EXPECT_EQ(status, WH_INVALID_ARGUMENT) << message;
  EXPECT_EQ(nodes, 0u) << "something was launched: " << message;
  for (const std::string& word : words) {
    EXPECT_NE(message.find(word), std::string::npos) << "no \"" << word << "\" in: " << message;
  }
  ASSERT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  // Without a capture it is the same error, and out is left alone.
  EXPECT_EQ(attention.run(tensors, stream), WH_INVALID_ARGUMENT);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  const std::vector<uint16_t> out = attention.out.download<uint16_t>();
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](uint16_t bits) { return bits == 0xffff; }));
}

struct Pointer {
  const char* name;
  const void* wh_tensors::*field;
};
constexpr Pointer kInputs[] = {{"q", &wh_tensors::q}, {"k", &wh_tensors::k}, {"v", &wh_tensors::v}};

TEST_P(GpuInputs, HostMemoryIsAnError) {
  wh_problem p = problem_with_workspace();
  p.uses = WH_USES_KEY_LENGTHS;
  GpuAttention attention(p);
  attention.plan_for(kernel());
  std::vector<uint16_t> plain(attention.q.size() + attention.k.size());
  void* pinned = nullptr;
  ASSERT_EQ(cudaMallocHost(&pinned, plain.size() * 2), cudaSuccess);
  for (void* host : {static_cast<void*>(plain.data()), pinned}) {
    for (const Pointer& input : kInputs) {
      wh_tensors t = attention.tensors();
      t.*input.field = host;
      expect_error(attention, t, {std::string(input.name) + " is host memory", "cuda:0"});
    }
    wh_tensors t = attention.tensors();
    t.out = host;
    expect_error(attention, t, {"out is host memory"});
    t = attention.tensors();
    t.key_lengths = static_cast<const int32_t*>(host);
    expect_error(attention, t, {"key_lengths is host memory"});
    t = attention.tensors();
    ASSERT_GT(t.workspace_bytes, 0u);
    t.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(host) + 63) / 64 * 64);
    expect_error(attention, t, {"workspace is host memory"});
  }
  ASSERT_EQ(cudaFreeHost(pinned), cudaSuccess);
}

TEST_P(GpuInputs, MisalignedMemoryIsAnError) {
  GpuAttention attention(problem_with_workspace());
  attention.plan_for(kernel());
  const bool needs_16_bytes = kernel().rfind("sm90", 0) == 0;
  const auto shifted = [](const void* pointer, int bytes) {
    return static_cast<const void*>(static_cast<const char*>(pointer) + bytes);
  };
  for (const Pointer& input : kInputs) {
    // No element of 16 bits lies at an odd address.
    wh_tensors t = attention.tensors();
    t.*input.field = shifted(t.*input.field, 1);
    expect_error(attention, t, {input.name, "aligned"});
    if (!needs_16_bytes) continue;
    // With an out of its own, which the shifted tensor's end cannot reach into.
    const DeviceBuffer apart(attention.q.size() * 2 + 4096);
    t = attention.tensors();
    t.out = static_cast<char*>(apart.data()) + 2048;
    t.*input.field = shifted(t.*input.field, 8);
    expect_error(attention, t, {input.name, "aligned to 16 bytes"});
  }
  wh_tensors t = attention.tensors();
  t.out = const_cast<void*>(shifted(t.out, 1));
  expect_error(attention, t, {"out", "aligned"});
  t = attention.tensors();
  t.workspace = const_cast<void*>(shifted(t.workspace, 8));
  expect_error(attention, t, {"workspace", "aligned to 64 bytes"});
}

TEST_P(GpuInputs, AWorkspaceTooSmallIsAnError) {
  GpuAttention attention(problem_with_workspace());
  attention.plan_for(kernel());
  wh_tensors t = attention.tensors();
  ASSERT_GT(t.workspace_bytes, 0u);
  const std::string planned = std::to_string(t.workspace_bytes);
  --t.workspace_bytes;
  expect_error(attention, t, {"workspace_bytes is " + std::to_string(t.workspace_bytes), planned});
  t.workspace = nullptr;
  expect_error(attention, t, {"workspace is null", planned});
}

TEST_P(GpuInputs, MemoryOfAnotherDeviceIsAnError) {
  if (device_count() < 2) GTEST_SKIP() << "needs two GPUs";
  GpuAttention attention(problem_with_workspace());
  attention.plan_for(kernel());
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  {
    const DeviceBuffer other(attention.q.size() * 2 + attention.k.size() * 2);
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    for (const Pointer& input : kInputs) {
      wh_tensors t = attention.tensors();
      t.*input.field = other.data();
      expect_error(attention, t, {std::string(input.name) + " is memory of cuda:1", "cuda:0"});
    }
    wh_tensors t = attention.tensors();
    t.out = other.data();
    expect_error(attention, t, {"out is memory of cuda:1"});
  }
}

// Nothing is launched with such a stream: out keeps its bits.
void expect_stream_error(GpuAttention& attention, cudaStream_t stream) {
  attention.out.fill(0xff);
  EXPECT_NE(attention.run(attention.tensors(), stream), WH_OK);
  const std::string message = wh_last_error();
  EXPECT_NE(message.find("stream"), std::string::npos) << message;
  const std::vector<uint16_t> out = attention.out.download<uint16_t>();
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](uint16_t bits) { return bits == 0xffff; }));
  EXPECT_EQ(cudaGetLastError(), cudaSuccess) << "the error is left to the next call";
}

TEST_P(GpuInputs, AStreamOfAnotherDeviceIsAnError) {
  if (device_count() < 2) GTEST_SKIP() << "needs two GPUs";
  GpuAttention attention(problem_with_workspace());
  attention.plan_for(kernel());
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  expect_stream_error(attention, stream);
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

// The driver's functions for contexts, found through the runtime: nothing here links the driver.
template <typename Function>
Function driver_function(const char* name, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  EXPECT_EQ(cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found),
            cudaSuccess);
  EXPECT_EQ(found, cudaDriverEntryPointSuccess) << name;
  return reinterpret_cast<Function>(function);
}

TEST_P(GpuInputs, AStreamOfAnotherContextIsAnError) {
  GpuAttention attention(problem_with_workspace());
  attention.plan_for(kernel());
  // The ABI of CUDA 11: context, flags, device.
  const auto create = driver_function<int (*)(void**, unsigned, int)>("cuCtxCreate", 11000);
  const auto pop = driver_function<int (*)(void**)>("cuCtxPopCurrent", 11000);
  const auto destroy = driver_function<int (*)(void*)>("cuCtxDestroy", 11000);
  const auto create_stream =
      driver_function<int (*)(cudaStream_t*, unsigned)>("cuStreamCreate", 11000);
  ASSERT_TRUE(create != nullptr && pop != nullptr && destroy != nullptr &&
              create_stream != nullptr);
  void* context = nullptr;
  void* popped = nullptr;
  cudaStream_t stream = nullptr;
  ASSERT_EQ(create(&context, 0, 0), 0);
  ASSERT_EQ(create_stream(&stream, 0), 0);
  ASSERT_EQ(pop(&popped), 0);
  expect_stream_error(attention, stream);
  ASSERT_EQ(destroy(context), 0);
  // The device's own context is unharmed.
  EXPECT_EQ(attention.run(attention.tensors()), WH_OK) << wh_last_error();
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST(Gpu, ADeviceThatDoesNotExistIsRefused) {
  if (device_count() == 0) GTEST_SKIP() << "no GPU";
  wh_problem p = gpu_problem(1, 2, 1, 8, 8, 64);
  p.device_index = 99;
  wh_plan* plan = nullptr;
  EXPECT_EQ(wh_plan_create(&p, nullptr, &plan), WH_REFUSED);
  EXPECT_NE(std::string(wh_last_error()).find("there is no device 99"), std::string::npos)
      << wh_last_error();
  wh_plan_destroy(plan);
}

INSTANTIATE_TEST_SUITE_P(Cuda, GpuInputs, testing::ValuesIn(kernels_under_test()), kernel_name);

}  // namespace
}  // namespace wh
