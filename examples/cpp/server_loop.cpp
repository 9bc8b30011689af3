// A server's loop: requests are admitted as pages become free, their prompts come in chunks beside
// the one token of those that generate, and every step is the same two calls, append and attention,
// over arrays whose contents alone change. The plan is made once, for the most that a step may
// hold; with CUDA (-DWITH_CUDA) the calls are captured once and replayed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>
#include <widehead/widehead.hpp>
#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#endif

constexpr int64_t kHeads = 8, kHeadsKv = 2, kDim = 128;
constexpr int64_t kPages = 24, kPageSize = 16, kSequences = 4, kLength = 160, kTokens = 64;
constexpr int64_t kTablePages = kLength / kPageSize;  // of a sequence

struct Request {
  int number, prompt, wanted;  // tokens of the prompt, and to generate
  int done = 0;                // tokens in the cache
  std::vector<int32_t> pages{};
  int length() const { return prompt + wanted; }
};

static int64_t all_bytes = 0;
template <typename T>
T* allocate(int64_t count) {  // what host and device both see
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  all_bytes += bytes;
  void* data = nullptr;
#ifdef WITH_CUDA
  if (cudaMallocManaged(&data, static_cast<size_t>(bytes)) != cudaSuccess) std::abort();
#else
  data = ::operator new (static_cast<size_t>(bytes), std::align_val_t{64});
#endif
  std::fill_n(static_cast<T*>(data), count, T{});
  return static_cast<T*>(data);
}

// Floats of few bits as bf16.
static uint16_t bf16(float value) {
  uint32_t bits;
  std::copy_n(reinterpret_cast<const char*>(&value), 4, reinterpret_cast<char*>(&bits));
  return static_cast<uint16_t>(bits >> 16);
}

int main() try {
  auto *q = allocate<uint16_t>(kTokens * kHeads * kDim),
       *out = allocate<uint16_t>(kTokens * kHeads * kDim);
  auto *new_k = allocate<uint16_t>(kTokens * kHeadsKv * kDim),
       *new_v = allocate<uint16_t>(kTokens * kHeadsKv * kDim);
  auto *k = allocate<uint16_t>(kPages * kPageSize * kHeadsKv * kDim),
       *v = allocate<uint16_t>(kPages * kPageSize * kHeadsKv * kDim);
  auto *query_offsets = allocate<int32_t>(kSequences + 1),
       *key_lengths = allocate<int32_t>(kSequences);
  auto* page_table = allocate<int32_t>(kSequences * kTablePages);
  auto* slots = allocate<int64_t>(kTokens);

  using widehead::Dtype;
  const auto q_view = widehead::packed(q, Dtype::kBf16, kTokens, kHeads, kDim);
  const auto out_view = widehead::packed(out, Dtype::kBf16, kTokens, kHeads, kDim);
  const auto k_view = widehead::paged(k, Dtype::kBf16, kPages, kPageSize, kHeadsKv, kDim);
  const auto v_view = widehead::paged(v, Dtype::kBf16, kPages, kPageSize, kHeadsKv, kDim);
  widehead::Options options{.causal = widehead::Causal::kBottomRight,
                            .key_lengths = key_lengths,
                            .sequences = {{.batch = kSequences,
                                           .len_q = kTokens,
                                           .len_k = kLength,
                                           .query_offsets = query_offsets,
                                           .page_table = page_table}}};
  widehead::RunOptions run;
#ifdef WITH_CUDA
  options.device = widehead::Device::kCuda;
  cudaStream_t stream;
  if (cudaStreamCreate(&stream) != cudaSuccess) std::abort();
  run.stream = stream;
#endif
  const auto plan = widehead::plan(widehead::problem(q_view, k_view, v_view, out_view, options));
  auto tensors = widehead::tensors(q_view, k_view, v_view, out_view, options);
  tensors.workspace_bytes = static_cast<size_t>(plan.workspace_bytes());
  tensors.workspace = allocate<char>(static_cast<int64_t>(tensors.workspace_bytes));
  std::printf(
      "%s over at most %ld sequences and %ld tokens a step: %ld bytes for everything, %zu of them "
      "workspace\n",
      plan.kernel().c_str(), long{kSequences}, long{kTokens}, static_cast<long>(all_bytes),
      tensors.workspace_bytes);

  const auto calls = [&] {
    widehead::append(widehead::packed(new_k, Dtype::kBf16, kTokens, kHeadsKv, kDim),
                     widehead::packed(new_v, Dtype::kBf16, kTokens, kHeadsKv, kDim),
                     {slots, kTokens}, k_view, v_view, run, options.device);
    plan.run(tensors, run);
  };
#ifdef WITH_CUDA
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  calls();
  cudaStreamEndCapture(stream, &graph);
  if (cudaGraphInstantiate(&replay, graph, 0) != cudaSuccess) std::abort();
#endif

  std::vector<Request> waiting{{1, 100, 20}, {2, 7, 40},  {3, 90, 3}, {4, 33, 12},
                               {5, 1, 30},   {6, 140, 5}, {7, 16, 16}};
  std::vector<Request> running;
  std::vector<int32_t> free_pages(kPages);
  for (int32_t i = 0; i < kPages; ++i) free_pages[static_cast<size_t>(i)] = i;
  for (int step = 0; !waiting.empty() || !running.empty(); ++step) {
    while (!waiting.empty() &&
           running.size() < kSequences) {  // all pages that it will need, or later
      const auto needed = (waiting.front().length() + kPageSize - 1) / kPageSize;
      if (needed > static_cast<int64_t>(free_pages.size())) break;
      running.push_back(waiting.front());
      waiting.erase(waiting.begin());
      running.back().pages.assign(free_pages.end() - needed, free_pages.end());
      free_pages.resize(free_pages.size() - static_cast<size_t>(needed));
    }
    int64_t token = 0;
    for (size_t s = 0; s < kSequences; ++s) {
      query_offsets[s] = static_cast<int32_t>(token);
      key_lengths[s] = 0;
      if (s >= running.size()) continue;
      Request& request = running[s];
      // The rest of its prompt or one token, but one is left for each behind it.
      const int64_t left = kTokens - token - static_cast<int64_t>(running.size() - s - 1);
      const int64_t count = std::min<int64_t>(std::max(1, request.prompt - request.done), left);
      std::copy(request.pages.begin(), request.pages.end(), page_table + s * kTablePages);
      for (int64_t i = 0; i < count; ++i, ++token, ++request.done) {
        slots[token] = request.pages[static_cast<size_t>(request.done / kPageSize)] * kPageSize +
                       request.done % kPageSize;
        // A model's layer would be here. Values are the request's number: so must its rows be.
        std::fill_n(q + token * kHeads * kDim, kHeads * kDim, bf16(0.25f));
        std::fill_n(new_k + token * kHeadsKv * kDim, kHeadsKv * kDim,
                    bf16(static_cast<float>(request.done % 8) / 8));
        std::fill_n(new_v + token * kHeadsKv * kDim, kHeadsKv * kDim,
                    bf16(static_cast<float>(request.number)));
      }
      key_lengths[s] = request.done;
    }
    query_offsets[kSequences] = static_cast<int32_t>(token);
    std::fill(slots + token, slots + kTokens, -1);
#ifdef WITH_CUDA
    if (cudaGraphLaunch(replay, stream) != cudaSuccess ||
        cudaStreamSynchronize(stream) != cudaSuccess)
      std::abort();
#else
    calls();
#endif
    for (size_t s = 0; s < running.size(); ++s) {
      for (int64_t i = query_offsets[s] * kHeads * kDim; i < query_offsets[s + 1] * kHeads * kDim;
           ++i) {
        if (out[i] == bf16(static_cast<float>(running[s].number))) continue;
        std::printf("step %d: request %d read another's pages\n", step, running[s].number);
        return 1;
      }
    }
    if (step % 10 == 0)
      std::printf("step %d: %zu sequences, %ld tokens, %zu pages free\n", step, running.size(),
                  static_cast<long>(token), free_pages.size());
    std::erase_if(running, [&](const Request& request) {
      if (request.done < request.length()) return false;
      free_pages.insert(free_pages.end(), request.pages.begin(), request.pages.end());
      return true;
    });
  }
  std::printf("all done, in those %ld bytes\n", static_cast<long>(all_bytes));
} catch (const widehead::Error& error) {
  std::printf("%s\n", error.what());
  return 1;
}
