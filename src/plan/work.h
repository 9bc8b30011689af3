// How much arithmetic and memory traffic a problem is, from its shape alone.
#pragma once

#include "core/problem.h"

namespace wh {

// Query-key pairs of one head of one batch entry that causal and window leave visible, with every
// key present. Key lengths are data, not shape: they count as full.
double visible_pairs(const Problem& problem);

// The most keys that so many neighbouring queries of one head may see together: fewer than len_k
// with a window on both sides. Their first one depends on key lengths, their number does not.
int64_t most_visible_keys(const Problem& problem, int64_t queries);
int64_t most_visible_keys(const Problem& problem);  // of all queries

// How many sequences of the most queries the work is that of: fewer than the batch has where
// queries are packed and most sequences have fewer.
double sequences(const Problem& problem);

// A sequence's keys, to the most that one may have: what there is room for tells, where keys are
// packed or in pages.
double mean_key_share(const Problem& problem);

// Multiply-adds counted twice, of a visible pair and query head: 2 * (dim_qk + dim_v), and in the
// backward pass, of five products, 2 * (3 * dim_qk + 2 * dim_v).
double flops_a_pair(const Problem& problem);
double useful_flops(const Problem& problem);  // of all

// Bytes of K and V that there is room for, each counted once, or of K alone where V lies in it:
// what decode streams. Scales of tokens count, others are few.
double kv_bytes(const Problem& problem);
double kv_bytes_a_key(const Problem& problem);  // and kv head

}  // namespace wh
