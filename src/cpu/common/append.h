// Writing rows of new keys and values into caches of any type, format and stride.
#pragma once

#include "core/kv_append.h"

namespace wh::cpu {

// Tokens [begin, end).
void append_tokens(const KvAppend& append, int64_t begin, int64_t end);

}  // namespace wh::cpu
