// NCCL's functions, from the library that the process has or finds: nothing links it, so a program
// that sends no messages between GPUs starts without it.
#pragma once

#include <nccl.h>

#include "core/status.h"

namespace wh::sharded {

struct Nccl {
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetErrorString) error_string;
  decltype(&ncclGetLastError) last_error;
  decltype(&ncclCommInitAll) init_all;
  decltype(&ncclCommDestroy) destroy;
  decltype(&ncclCommAbort) abort;
  decltype(&ncclCommCount) count;
  decltype(&ncclCommUserRank) user_rank;
  decltype(&ncclCommCuDevice) device;
  decltype(&ncclCommGetAsyncError) async_error;
  decltype(&ncclGroupStart) group_start;
  decltype(&ncclGroupEnd) group_end;
  decltype(&ncclSend) send;
  decltype(&ncclRecv) receive;
};

// Looked for once a process, by its soname: what a caller of ncclComm_t has loaded is found first.
Result<const Nccl*> nccl();

}  // namespace wh::sharded
