// A kind of device as the rest of the library sees it. Whoever needs more than this of a device is
// a part of its backend: nothing else tells devices apart.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/executor.h"
#include "core/json_writer.h"
#include "core/output_merge.h"
#include "core/status.h"
#include "plan/device_facts.h"
#include "plan/kernel.h"
#include "plan/profile.h"

namespace wh {

struct KvAppend;

// Where work is queued: a stream of a device of the kind. Null is the device's default stream,
// whichever device is current; a device without streams ignores it.
struct DeviceStream {
  int32_t device_index = 0;
  void* stream = nullptr;
};

// Calls that were captured, to be replayed as one: their time is the device's alone, where a launch
// from the host takes longer than many a kernel.
class Replay {
 public:
  virtual ~Replay() = default;
  // What one replay takes on the device, in microseconds; waits for it.
  virtual Result<double> us() = 0;
};

// Strides in elements; those of dim are 1 on a device with streams.
struct TensorCopy {
  void* to;
  const void* from;
  Strides stride_to, stride_from;
  std::array<int64_t, 4> extents;  // batch, heads, length, dim
  int64_t element_bytes;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // "the CPU": for messages.
  virtual const char* label() const = 0;

  // In the order in which they are offered; the last one always works.
  virtual std::span<const Kernel* const> kernels() const = 0;

  // Found out once a device; never throws. Asking may start a driver.
  virtual const DeviceFacts& facts(int32_t device_index) const = 0;
  // Facts for programs, as members of an object.
  virtual void write_facts(int32_t device_index, JsonWriter& json) const = 0;
  // What this build has for the device: names and texts for people. Asking may load code onto it.
  virtual std::vector<std::pair<std::string, std::string>> build_facts(int32_t) const { return {}; }
  // What a profile must have been measured on to hold there, the library's version aside.
  virtual ProfileIdentity identity(int32_t device_index) const = 0;

  // Whether it is the program's own processor: tensors are host memory, workers are threads of the
  // program, and a run has ended when its call returns.
  virtual bool is_host() const = 0;

  // In the order of the stream. kOutOfMemory with the bytes wanted, or kDeviceError with the
  // driver's words.
  virtual Result<void*> allocate(DeviceStream on, size_t bytes) const = 0;
  virtual void release(DeviceStream on, void* data) const noexcept = 0;
  // Either way between the host and the device; done when it returns.
  virtual Status copy(DeviceStream on, void* to, const void* from, size_t bytes) const = 0;
  // One tensor [batch, heads, length, dim] into another on the device, in the order of the stream.
  virtual Status copy(DeviceStream on, const TensorCopy& copy, const Executor& executor) const = 0;
  // Numbers of the host onto the device, in the order of the stream: they must stay until then.
  virtual Status write(DeviceStream on, void* to, std::span<const int32_t> numbers) const = 0;
  // Waits, and answers with what went wrong on the stream.
  virtual Status synchronize(DeviceStream on) const = 0;

  // Whether the tensors lie on the problem's device, and the stream is one of it.
  virtual Status check(const Problem& problem, const Tensors& tensors, void* stream) const = 0;
  // With the problem's device made the current one, where there is such a thing.
  virtual Status run(const Kernel& kernel, const Launch& launch) const = 0;
  // Attention over all keys from that over parts of them.
  virtual Status merge(const OutputMerge& merge, const Executor& executor,
                       DeviceStream on) const = 0;
  // New keys and values into their caches.
  virtual Status append(const KvAppend& append, const Executor& executor,
                        DeviceStream on) const = 0;
  // Captures whatever call(stream) puts on the stream, and replays it once.
  virtual Result<std::unique_ptr<Replay>> capture(
      int32_t device_index, const std::function<Status(void* stream)>& call) const = 0;
};

// The one lookup.
const Backend& backend(Device device);

}  // namespace wh
