#include "cpu/reference/backward.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "core/carver.h"
#include "core/element.h"
#include "core/key_rows.h"
#include "core/own_keys.h"
#include "core/score_rules.h"
#include "cpu/cpu_facts.h"
#include "cpu/reference/row.h"
#include "cpu/registry.h"
#include "plan/work.h"

namespace wh::cpu {
namespace {

// One kv head's, in float64.
struct Scratch {
  double* scores;      // [len_k]
  double* is_visible;  // [len_k]
  double* slopes;      // [len_k]
  double* gradients;   // [len_k]: of the weights, then of the scores
  double* dq;          // [dim_qk]
  double* dk;          // [len_k, dim_qk]
  double* dv;          // [len_k, dim_v]
  double* d_sinks;     // [group]

  Scratch(Carver& carver, const Problem& p)
      : scores(carver.take<double>(p.len_k)),
        is_visible(carver.take<double>(p.len_k)),
        slopes(carver.take<double>(p.len_k)),
        gradients(carver.take<double>(p.len_k)),
        dq(carver.take<double>(p.dim_qk)),
        dk(carver.take<double>(p.len_k * p.dim_qk)),
        dv(carver.take<double>(p.len_k * p.dim_v)),
        d_sinks(carver.take<double>(p.group())) {}
};

class Backward {
 public:
  Backward(const Problem& p, const Tensors& t, Sums sums, const Scratch& scratch)
      : p_(p), t_(t), is_roundings_(sums == Sums::kRoundings), w_(scratch) {}

  bool run(int64_t head_kv, Progress& progress) {
    const int64_t group = p_.group();
    std::fill_n(w_.d_sinks, group, 0.0);
    for (int64_t b = 0; b < p_.batch; ++b) {
      const Sequence sequence = sequence_at(p_, t_, b);
      std::fill_n(w_.dk, p_.len_k * p_.dim_qk, 0.0);
      std::fill_n(w_.dv, p_.len_k * p_.dim_v, 0.0);
      for (int64_t row = 0; row < group * sequence.len_q; ++row) {
        progress.writing_out();
        add_row({sequence, head_kv * group + row / sequence.len_q, head_kv, row % sequence.len_q});
        if (!progress.step_done()) return false;
      }
      store_keys(sequence, head_kv);
    }
    for (int64_t head = 0; p_.has_sinks && head < group; ++head) {
      t_.d_sinks[head_kv * group + head] = static_cast<float>(total(w_.d_sinks[head]));
    }
    return true;
  }

 private:
  double term(double x) const { return is_roundings_ ? x * x : x; }
  double total(double sum) const { return is_roundings_ ? std::sqrt(sum) : sum; }

  int64_t key_offset(const Sequence& sequence, int64_t head_kv, const Strides& stride,
                     int64_t key) const {
    return key_rows(p_, t_, sequence).offset(stride[0], stride[2], key) + head_kv * stride[1];
  }

  // Adds the row's part to dk, dv and d_sinks, and stores its dq.
  void add_row(const Row& row) {
    const KeyRange keys = visible_keys(p_, row.sequence, row.query_idx);
    const double shift = score_row(p_, t_, row, keys, {w_.scores, w_.is_visible, w_.slopes});
    const double sink_weight = std::exp(sink_of(p_, t_, row) - shift);
    double denominator = sink_weight;
    for (int64_t j = 0; j < keys.size(); ++j) {
      if (w_.is_visible[j] != 0) denominator += w_.scores[j] = std::exp(w_.scores[j] - shift);
    }
    std::fill_n(w_.dq, p_.dim_qk, 0.0);
    if (!is_empty_row(denominator)) {
      const double delta = weigh(row, keys, denominator);
      add_scores(row, keys, delta);
      w_.d_sinks[row.head_q % p_.group()] -= sink_term(sink_weight / denominator * delta);
    }
    const int64_t dq = row.offset(p_.stride_dq);
    for (int64_t d = 0; d < p_.dim_qk; ++d) {
      store_element(t_.dq, p_.dtype_q, dq + d * p_.stride_dq[3],
                    static_cast<float>(total(w_.dq[d])));
    }
  }

  double sink_term(double x) const { return is_roundings_ ? -x * x : x; }

  // Weights and their gradients; adds to dv. Returns the sum over keys of weight times gradient.
  double weigh(const Row& row, KeyRange keys, double denominator) {
    const int64_t d_out = row.offset(p_.stride_d_out);
    double delta = 0;
    for (int64_t j = 0; j < keys.size(); ++j) {
      if (w_.is_visible[j] == 0) continue;
      const int64_t key = keys.begin + j;
      const int64_t v = key_offset(row.sequence, row.head_kv, p_.stride_v, key);
      const double weight = w_.scores[j] /= denominator;
      double gradient = 0;
      for (int64_t d = 0; d < p_.dim_v; ++d) {
        const double of_out = load_element(t_.d_out, p_.dtype_q, d_out + d * p_.stride_d_out[3]);
        gradient += term(of_out * load_element(t_.v, p_.dtype_kv, v + d * p_.stride_v[3]));
        w_.dv[key * p_.dim_v + d] += term(weight * of_out);
      }
      w_.gradients[j] = total(gradient);
      delta += weight * w_.gradients[j];
    }
    return delta;
  }

  // Adds to dq and dk.
  void add_scores(const Row& row, KeyRange keys, double delta) {
    const int64_t q = row.offset(p_.stride_q);
    for (int64_t j = 0; j < keys.size(); ++j) {
      if (w_.is_visible[j] == 0) continue;
      const int64_t key = keys.begin + j;
      const int64_t k = key_offset(row.sequence, row.head_kv, p_.stride_k, key);
      const double of_weight =
          is_roundings_ ? w_.gradients[j] + delta : (w_.gradients[j] - delta) * w_.slopes[j];
      const double gradient = w_.scores[j] * of_weight * p_.scale;
      for (int64_t d = 0; d < p_.dim_qk; ++d) {
        w_.dq[d] += term(gradient * load_element(t_.k, p_.dtype_kv, k + d * p_.stride_k[3]));
        w_.dk[key * p_.dim_qk + d] +=
            term(gradient * load_element(t_.q, p_.dtype_q, q + d * p_.stride_q[3]));
      }
    }
  }

  void store_keys(const Sequence& sequence, int64_t head_kv) {
    const int64_t keys = own_keys(sequences_of(p_, t_), sequence.batch_idx);
    for (int64_t key = 0; key < keys; ++key) {
      const int64_t dk = key_offset(sequence, head_kv, p_.stride_dk, key);
      const int64_t dv = key_offset(sequence, head_kv, p_.stride_dv, key);
      for (int64_t d = 0; d < p_.dim_v; ++d) {
        const double sum = w_.dv[key * p_.dim_v + d];
        if (p_.values_in_keys) {
          w_.dk[key * p_.dim_qk + d] += sum;
        } else {
          store_element(t_.dv, p_.dtype_kv, dv + d * p_.stride_dv[3],
                        static_cast<float>(total(sum)));
        }
      }
      for (int64_t d = 0; d < p_.dim_qk; ++d) {
        store_element(t_.dk, p_.dtype_kv, dk + d * p_.stride_dk[3],
                      static_cast<float>(total(w_.dk[key * p_.dim_qk + d])));
      }
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const bool is_roundings_;
  const Scratch& w_;
};

WorkerScratches scratches_of(const Problem& p) {
  Carver one(nullptr);
  Scratch(one, p);
  return {Carver(nullptr), one};
}

Status run(const Launch& launch) {
  const Problem& p = launch.problem;
  Progress& progress = launch.progress;
  progress.start(query_rows(p, launch.tensors), "the gradients are");
  const WorkerScratches scratches = scratches_of(p);
  std::atomic<int64_t> next{0};
  parallel(launch.executor, launch.config.workers, [&](int32_t i) {
    std::byte* scratch = scratches.at(launch.tensors.workspace, i);
    for (int64_t head = next++; head < p.heads_kv && !progress.is_cancelled(); head = next++) {
      if (!reference_backward(p, launch.tensors, head, Sums::kGradients, scratch, progress)) return;
    }
  });
  return progress.finish();
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return scratches_of(p).bytes(config.workers);
}

Config configure(const Query& query) {
  Config config;
  config.arithmetic = Arithmetic::kF64;
  config.workers = static_cast<int32_t>(
      std::min<int64_t>(cpu_facts(query).threads(query.limits.threads), query.problem.heads_kv));
  return config;
}

constexpr double kMultiplyAddUs = 1.5e-3;  // as cpu_reference's

double estimate_us(const Query& query, const Config& config) {
  constexpr double kCallUs = 10;
  return useful_flops(query.problem) / 2 * kMultiplyAddUs /
             std::min(config.workers, cpu_facts(query).cores) +
         kCallUs;
}

double step_us(const Query& query, const Config&) {
  const Problem& p = query.problem;
  return static_cast<double>(p.len_k * (3 * p.dim_qk + 2 * p.dim_v)) * kMultiplyAddUs;
}

}  // namespace

size_t reference_backward_bytes(const Problem& p) {
  Carver carver(nullptr);
  Scratch(carver, p);
  return carver.bytes();
}

bool reference_backward(const Problem& p, const Tensors& t, int64_t head_kv, Sums sums,
                        void* scratch, Progress& progress) {
  Carver carver(scratch);
  const Scratch pieces(carver, p);
  return Backward(p, t, sums, pieces).run(head_kv, progress);
}

const Kernel kReferenceBackward{
    .name = "cpu_reference_backward",
    .role = Role::kReference,
    .summary = "gradients in float64, row by row: the oracle",
    .pass = Pass::kBackward,
    .takes_all_layouts = true,
    .refusal = [](const Query&) -> std::optional<std::string> { return std::nullopt; },
    .configure = configure,
    .variant = [](const Query&, const Config&) -> std::string { return "float64"; },
    .workspace_bytes = workspace_bytes,
    .estimate_us = estimate_us,
    .run = run,
    .step_us = step_us};

}  // namespace wh::cpu
