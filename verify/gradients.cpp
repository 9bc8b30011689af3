#include "verify/gradients.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/element.h"
#include "core/executor.h"
#include "core/key_rows.h"
#include "core/sequence.h"
#include "cpu/reference/backward.h"
#include "cpu/reference/reference.h"
#include "cpu/reference/row.h"
#include "verify/answer.h"
#include "verify/elements.h"
#include "verify/errors.h"
#include "verify/execution.h"
#include "verify/random_rows.h"
#include "verify/rows.h"

namespace wh {
namespace {

constexpr std::byte kPoison{0xff};

using Extents = std::array<int64_t, 4>;

// What sequences have of the tensors as they are stored: of packed ones the first tokens.
class Tokens {
 public:
  Tokens(const Problem& p, const Tensors& t)
      : p_(p), queries_(query_storage(p)), keys_(key_storage(p)) {
    if (p.query_layout == QueryLayout::kPacked) queries_.length = t.query_offsets[p.batch];
    if (p.key_layout == KeyLayout::kPacked) keys_.length = t.key_offsets[p.batch];
  }

  Extents of_q() const { return {queries_.batch, p_.heads_q, queries_.length, p_.dim_qk}; }
  Extents of_out() const { return {queries_.batch, p_.heads_q, queries_.length, p_.dim_v}; }
  Extents of_k() const { return {keys_.batch, p_.heads_kv, keys_.length, p_.dim_qk}; }
  Extents of_v() const { return {keys_.batch, p_.heads_kv, keys_.length, p_.dim_v}; }
  int64_t rows() const { return queries_.batch * p_.heads_q * queries_.length; }
  int64_t keys() const { return keys_.batch * p_.heads_kv * keys_.length; }

 private:
  const Problem& p_;
  Storage queries_, keys_;
};

Strides dense(const Extents& extents) { return dense_strides(extents[1], extents[2], extents[3]); }

// No gradients are of pages: they become packed keys, of as many keys a sequence.
void pack_pages(Input& input) {
  Problem& p = input.problem;
  if (p.key_layout != KeyLayout::kPaged) return;
  p.key_layout = KeyLayout::kPacked;
  input.key_offsets = {0};
  for (const int32_t length : input.key_lengths) {
    input.key_offsets.push_back(input.key_offsets.back() + length);
  }
  p.total_k = input.key_offsets.back();
  p.has_key_lengths = p.has_page_offsets = false;
  p.page_size = p.pages = p.page_entries = p.stride_page_table = 0;
  input.key_lengths.clear();
  input.page_table.clear();
  input.page_offsets.clear();
  const bool is_shared = p.stride_k[1] == 0;
  p.stride_k = token_strides(p.heads_kv, p.total_k, p.dim_qk);
  p.stride_v = p.values_in_keys ? p.stride_k : token_strides(p.heads_kv, p.total_k, p.dim_v);
  if (is_shared) p.stride_k[1] = p.stride_v[1] = 0;
}

Input forward_input(Input input) {
  input.problem.pass = Pass::kForward;
  input.problem.wants_log_sum_exp = true;
  input.problem.f32_out = false;  // the backward pass takes no other type than d_out has
  input.problem.quantised_k = input.problem.quantised_v = Quantised::kNone;  // nor codes
  input.problem.scales_k = input.problem.scales_v = Scales::kNone;
  pack_pages(input);
  return input;
}

Problem backward_problem(const Input& input) {
  Problem p = forward_input(input).problem;
  p.pass = Pass::kBackward;
  p.stride_dq = p.stride_q;
  const auto dense_keys = [&](int64_t dim) {
    return dense_strides(p.heads_kv, key_storage(p).length, dim);
  };
  p.stride_dk = p.stride_k[1] == 0 ? dense_keys(p.dim_qk) : p.stride_k;
  if (!p.values_in_keys) p.stride_dv = p.stride_v[1] == 0 ? dense_keys(p.dim_v) : p.stride_v;
  if (!input.is_hostile) {
    p.stride_d_out = p.stride_out;
    return p;
  }
  switch (mix(input.seed) % 4) {
    case 0:
      break;  // one number for all, as from a sum
    case 1:
      p.stride_d_out = token_strides(p.heads_q, query_storage(p).length, p.dim_v);
      break;
    default:
      p.stride_d_out = p.stride_out;
  }
  return p;
}

// Calls body(element's indices) for every element.
template <typename Body>
void for_each_element(const Extents& extents, Body&& body) {
  for (int64_t b = 0; b < extents[0]; ++b) {
    for (int64_t h = 0; h < extents[1]; ++h) {
      for (int64_t i = 0; i < extents[2]; ++i) {
        for (int64_t d = 0; d < extents[3]; ++d) body(b, h, i, d);
      }
    }
  }
}

// A tensor widened to f32, dense.
std::vector<float> widened(const void* data, Dtype dtype, const Extents& extents,
                           const Strides& stride) {
  std::vector<float> values;
  values.reserve(static_cast<size_t>(extents[0] * extents[1] * extents[2] * extents[3]));
  for_each_element(extents, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
    values.push_back(load_element(data, dtype, offset_of(stride, b, h, i, d)));
  });
  return values;
}

std::vector<int64_t> all_rows(const Extents& extents) {
  std::vector<int64_t> rows(static_cast<size_t>(extents[0] * extents[1] * extents[2]));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

// Below it 16-bit types lose bits, and cpu_backward flushes weights to 0.
double smallest(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF16:
      return 0x1p-24;
    case Dtype::kF32:
    case Dtype::kBf16:
      return 0x1p-126;
  }
  __builtin_unreachable();  // validate() knows no other
}

uint64_t fingerprint_of(const GuardedTensor& d_out, const HostTensors& inputs) {
  return mix(d_out.fingerprint() ^ mix(inputs.out.fingerprint()) ^
             mix(mix(inputs.log_sum_exp.fingerprint())));
}

}  // namespace

GradientTensors::GradientTensors(const Input& input) : GradientTensors(input, Unfilled()) {
  const Problem& p = problem_;
  std::vector<double> scratch(cpu::reference_workspace_bytes(p) / sizeof(double));
  const Tensors t = inputs_.tensors();
  cpu::reference_rows(inputs_.problem, t, 0, query_rows(p, t), scratch.data());
  note_inputs();
}

Result<GradientTensors> GradientTensors::after_a_run(const Input& input) {
  GradientTensors data(input, Unfilled());
  Result<Execution> forward =
      Execution::prepare(data.inputs_.problem, Limits(), data.inputs_.tensors());
  if (!forward.ok()) return forward.status();
  WH_RETURN_IF_ERROR(forward->run());
  WH_RETURN_IF_ERROR(forward->fetch_outputs());
  data.note_inputs();
  return data;
}

GradientTensors::GradientTensors(const Input& input, Unfilled)
    : problem_(backward_problem(input)), inputs_(forward_input(input)) {
  const Problem& p = problem_;
  const TensorBytes bytes = tensor_bytes(p);
  d_out_ = GuardedTensor(bytes.d_out);
  dq_ = GuardedTensor(bytes.dq);
  dk_ = GuardedTensor(bytes.dk);
  dv_ = GuardedTensor(bytes.dv);
  d_sinks_ = GuardedTensor(bytes.d_sinks);
  RowRandom random(input.seed, 99, 0);
  for_each_element(
      Tokens(p, inputs_.tensors()).of_out(), [&](int64_t b, int64_t h, int64_t i, int64_t d) {
        put(d_out_.data(), p.dtype_q, offset_of(p.stride_d_out, b, h, i, d), random.normal());
      });
}

void GradientTensors::note_inputs() { fingerprint_ = fingerprint_of(d_out_, inputs_); }

int64_t GradientTensors::bytes() const {
  return inputs_.bytes() + d_out_.size() + dq_.size() + dk_.size() + dv_.size() + d_sinks_.size();
}

Tensors GradientTensors::tensors() const {
  Tensors t = inputs_.tensors();
  t.d_out = d_out_.data();
  t.dq = dq_.data();
  t.dk = dk_.data();
  if (!problem_.values_in_keys) t.dv = dv_.data();
  if (problem_.has_sinks) t.d_sinks = reinterpret_cast<float*>(d_sinks_.data());
  return t;
}

void GradientTensors::poison_outputs() {
  for (GuardedTensor* tensor : {&dq_, &dk_, &dv_, &d_sinks_}) {
    std::fill_n(tensor->data(), tensor->size(), kPoison);
  }
}

std::string GradientTensors::damage() const {
  const Problem& p = problem_;
  const Tokens tokens(p, inputs_.tensors());
  const struct {
    const char* name;
    const GuardedTensor& tensor;
    Extents extents;
    const Strides& stride;
    Dtype dtype;
  } outputs[] = {{"dq", dq_, tokens.of_q(), p.stride_dq, p.dtype_q},
                 {"dk", dk_, tokens.of_k(), p.stride_dk, p.dtype_kv},
                 {"dv", dv_, tokens.of_v(), p.stride_dv, p.dtype_kv},
                 {"d_sinks", d_sinks_, {1, 1, 1, p.heads_q}, {0, 0, 0, 1}, Dtype::kF32}};
  for (const auto& one : outputs) {
    if (!one.tensor.guards_intact()) return fmt::format("memory around {} was written", one.name);
    if (one.tensor.size() == 0) continue;
    std::vector<bool> is_owned(static_cast<size_t>(one.tensor.size()));
    for_each_element(one.extents, [&](int64_t b, int64_t h, int64_t i, int64_t d) {
      const int64_t at = offset_of(one.stride, b, h, i, d) * bytes_of(one.dtype);
      std::fill_n(is_owned.begin() + at, bytes_of(one.dtype), true);
    });
    for (size_t i = 0; i < is_owned.size(); ++i) {
      if (!is_owned[i] && one.tensor.data()[i] != kPoison) {
        return fmt::format("byte {} between the elements of {} was written", i, one.name);
      }
    }
  }
  if (fingerprint_of(d_out_, inputs_) != fingerprint_) {
    return "d_out, out or log_sum_exp, or memory around it, was written: an input";
  }
  return inputs_.damage();
}

std::vector<std::byte> GradientTensors::answer() const {
  std::vector<std::byte> bytes;
  for (const GuardedTensor* tensor : {&dq_, &dk_, &dv_, &d_sinks_}) {
    bytes.insert(bytes.end(), tensor->data(), tensor->data() + tensor->size());
  }
  return bytes;
}

void ExpectedGradients::Rows::allocate(int64_t dim) {
  wanted.resize(rows.size() * static_cast<size_t>(dim));
  roundings.resize(wanted.size());
}

void ExpectedGradients::Rows::put(size_t index, double sum, double rounding) {
  wanted[index] = static_cast<float>(sum);
  // hypot() would ask for glibc 2.35.
  roundings[index] = static_cast<float>(std::sqrt(rounding * rounding + sum * sum));
}

ExpectedGradients::ExpectedGradients(const GradientTensors& data) {
  // The same problem with everything widened to f32, so that gradients are rounded to f32 alone.
  Problem p = data.problem_;
  Tensors t = data.tensors();
  const Tokens tokens(p, t);
  const auto q = widened(t.q, p.dtype_q, tokens.of_q(), p.stride_q);
  const auto k = widened(t.k, p.dtype_kv, tokens.of_k(), p.stride_k);
  const auto v = widened(t.v, p.dtype_kv, tokens.of_v(), p.stride_v);
  const auto d_out = widened(t.d_out, p.dtype_q, tokens.of_out(), p.stride_d_out);
  std::vector<float> mask;
  if (p.mask == MaskKind::kAdditiveQ) {
    const Extents extents{p.batch, p.heads_q, p.len_q, p.len_k};
    mask = widened(t.mask, p.dtype_q, extents, p.stride_mask);
    t.mask = mask.data();
    p.stride_mask = dense(extents);
    p.mask = MaskKind::kAdditiveF32;
  }
  p.dtype_q = p.dtype_kv = Dtype::kF32;
  p.stride_q = p.stride_dq = dense(tokens.of_q());
  p.stride_k = p.stride_dk = dense(tokens.of_k());
  p.stride_v = p.stride_dv = dense(tokens.of_v());
  p.stride_d_out = dense(tokens.of_out());
  t.q = q.data();
  t.k = k.data();
  t.v = v.data();
  t.d_out = d_out.data();
  dq_.rows = all_rows(tokens.of_q());
  dk_.rows = dv_.rows = all_rows(tokens.of_k());
  d_sinks_.rows = all_rows({1, p.heads_q, 1, 1});
  dq_.allocate(p.dim_qk);
  dk_.allocate(p.dim_qk);
  dv_.allocate(p.dim_v);
  d_sinks_.allocate(1);
  for (const auto& [sums, to] : {std::pair{cpu::Sums::kGradients, &Rows::wanted},
                                 {cpu::Sums::kRoundings, &Rows::roundings}}) {
    t.dq = (dq_.*to).data();
    t.dk = (dk_.*to).data();
    t.dv = (dv_.*to).data();
    t.d_sinks = (d_sinks_.*to).data();
    parallel(default_executor(), static_cast<int32_t>(p.heads_kv), [&, sums = sums](int32_t head) {
      std::vector<double> scratch(cpu::reference_backward_bytes(p) / sizeof(double) + 8);
      void* aligned =
          reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
      Progress unwatched;
      cpu::reference_backward(p, t, head, sums, aligned, unwatched);
    });
  }
  for (Rows* rows : {&dq_, &dk_, &dv_, &d_sinks_}) {
    for (size_t i = 0; i < rows->wanted.size(); ++i) {
      rows->put(i, rows->wanted[i], rows->roundings[i]);
    }
  }
}

namespace {

// Of one row of q and out.
struct RowState {
  double shift = 0, log_sum = 0;  // the log-sum-exp is their sum, which biases of 1e30 would round
  double delta = 0, delta_rounding = 0;  // of the sum over keys of weight times its gradient
};

// Of one row and a key that it sees.
struct PairState {
  double weight = 0;
  double gradient = 0, rounding = 0;  // of the product of q and k
};

// What a sample of gradients is summed from.
class Pairs {
 public:
  Pairs(const Problem& p, const Tensors& t) : p_(p), t_(t), tokens_(p, t) {}

  // Rows and keys are numbered within the tokens that sequences have: [batch, heads, tokens].
  cpu::Row row(int64_t row_idx) const {
    const int64_t tokens = tokens_.of_q()[2], pair = row_idx / tokens, head = pair % p_.heads_q;
    const QueryRow at{pair / p_.heads_q, head, row_idx % tokens};
    const Sequence sequence = sequence_of_row(p_, t_, at);
    return {sequence, head, head / p_.group(), at.query_idx - sequence.first_query};
  }
  int64_t number_of(const cpu::Row& row) const {
    return (row.sequence.query_batch * p_.heads_q + row.head_q) * tokens_.of_q()[2] +
           row.sequence.first_query + row.query_idx;
  }
  struct Key {
    Sequence sequence;
    int64_t head_kv, key;  // of the sequence
  };
  Key key(int64_t key_idx) const {
    const int64_t tokens = tokens_.of_k()[2], pair = key_idx / tokens, token = key_idx % tokens;
    int64_t batch_idx = pair / p_.heads_kv;
    if (p_.key_layout == KeyLayout::kPacked) {
      // The last one that begins there or before: those in front of it that do have no keys.
      const int32_t* offsets = t_.key_offsets;
      batch_idx = std::upper_bound(offsets, offsets + p_.batch + 1, token) - offsets - 1;
    }
    const Sequence sequence = sequence_at(p_, t_, batch_idx);
    return {sequence, pair % p_.heads_kv, token - sequence.first_key};
  }
  KeyRange keys_of(const cpu::Row& row) const {
    return visible_keys(p_, row.sequence, row.query_idx);
  }
  double q(const cpu::Row& row, int64_t d) const {
    return load_element(t_.q, p_.dtype_q, row.offset(p_.stride_q) + d * p_.stride_q[3]);
  }
  double d_out(const cpu::Row& row, int64_t d) const {
    return load_element(t_.d_out, p_.dtype_q, row.offset(p_.stride_d_out) + d * p_.stride_d_out[3]);
  }
  double k(const cpu::Row& row, int64_t key, int64_t d) const {
    return load_element(t_.k, p_.dtype_kv, key_offset(row, p_.stride_k, key, d));
  }

  RowState state(const cpu::Row& row) const {
    RowState state;
    double squares = 0;
    for (int64_t d = 0; d < p_.dim_v; ++d) {
      const double out =
          load_element(t_.out, p_.dtype_q, row.offset(p_.stride_out) + d * p_.stride_out[3]);
      const double term = d_out(row, d) * out;
      state.delta += term;
      squares += term * term;
    }
    state.delta_rounding = std::sqrt(squares);
    state.shift =
        t_.log_sum_exp[row_index(p_.query_layout, p_.heads_q, p_.len_q, row.sequence.query_batch,
                                 row.head_q, row.sequence.first_query + row.query_idx)];
    // Where rounded ones are coarse, kernels do not go by them either.
    constexpr double kCoarse = 64;
    if (std::isfinite(state.shift) && std::fabs(state.shift) > kCoarse) sum_again(row, state);
    return state;
  }

  PairState pair(const cpu::Row& row, const RowState& state, int64_t key) const {
    double score = 0, is_visible = 0, slope = 1;
    cpu::score_row(p_, t_, row, {key, key + 1}, {&score, &is_visible, &slope});
    if (is_visible == 0 || is_empty_row(state)) return {};
    double gradient = 0, squares = 0;
    for (int64_t d = 0; d < p_.dim_v; ++d) {
      const double v = load_element(t_.v, p_.dtype_kv, key_offset(row, p_.stride_v, key, d));
      const double term = d_out(row, d) * v;
      gradient += term;
      squares += term * term;
    }
    const double weight = weight_of(score, state), scaled = weight * p_.scale;
    return {weight, scaled * (gradient - state.delta) * slope,
            scaled * (std::sqrt(squares) + state.delta_rounding)};
  }

  static double weight_of(double score, const RowState& state) {
    return std::exp(score - state.shift - state.log_sum);
  }
  static bool is_empty_row(const RowState& state) {
    return state.shift == -std::numeric_limits<double>::infinity();
  }

 private:
  int64_t key_offset(const cpu::Row& row, const Strides& stride, int64_t key, int64_t d) const {
    return key_rows(p_, t_, row.sequence).offset(stride[0], stride[2], key) +
           row.head_kv * stride[1] + d * stride[3];
  }
  void sum_again(const cpu::Row& row, RowState& state) const {
    const KeyRange keys = keys_of(row);
    const auto size = static_cast<size_t>(std::max<int64_t>(1, keys.size()));
    std::vector<double> scores(size), is_visible(size);
    state.shift = cpu::score_row(p_, t_, row, keys, {scores.data(), is_visible.data(), nullptr});
    double sum = std::exp(cpu::sink_of(p_, t_, row) - state.shift);
    for (int64_t j = 0; j < keys.size(); ++j) {
      const auto i = static_cast<size_t>(j);
      if (is_visible[i] != 0) sum += std::exp(scores[i] - state.shift);
    }
    state.log_sum = std::log(sum);
  }

  const Problem& p_;
  const Tensors& t_;
  const Tokens tokens_;
};

// A sum and the sum of the squares of its terms.
struct Sum {
  double sum = 0, squares = 0;

  void add(double term, double rounding) {
    sum += term;
    squares += rounding * rounding;
  }
};

}  // namespace

ExpectedGradients::ExpectedGradients(const GradientTensors& data, int64_t most_rows) {
  const Problem& p = data.problem_;
  const Tensors t = data.tensors();
  const Pairs pairs(p, t);
  const Tokens tokens(p, t);
  const auto [batch_q, heads_q, tokens_q, dim_qk] = tokens.of_q();
  std::vector<RowState> states(static_cast<size_t>(tokens.rows()));
  for_each_row(1, 1, tokens.rows(), [&](RowIndex at) {
    states[static_cast<size_t>(at.idx)] = pairs.state(pairs.row(at.idx));
  });
  const auto state = [&](const cpu::Row& row) -> const RowState& {
    return states[static_cast<size_t>(pairs.number_of(row))];
  };
  const auto put_row = [](Rows& to, size_t index, const std::vector<Sum>& sums) {
    for (size_t d = 0; d < sums.size(); ++d) {
      to.put(index * sums.size() + d, sums[d].sum, std::sqrt(sums[d].squares));
    }
  };

  dq_.rows = sampled_rows(batch_q * heads_q, tokens_q, most_rows);
  dq_.allocate(p.dim_qk);
  parallel(default_executor(), static_cast<int32_t>(dq_.rows.size()), [&](int32_t i) {
    const cpu::Row row = pairs.row(dq_.rows[static_cast<size_t>(i)]);
    std::vector<Sum> sums(static_cast<size_t>(p.dim_qk));
    const KeyRange keys = pairs.keys_of(row);
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      const PairState pair = pairs.pair(row, state(row), key);
      for (int64_t d = 0; d < p.dim_qk; ++d) {
        const double k = pair.weight == 0 ? 0 : pairs.k(row, key, d);  // a masked one may be NaN
        sums[static_cast<size_t>(d)].add(pair.gradient * k, pair.rounding * k);
      }
    }
    put_row(dq_, static_cast<size_t>(i), sums);
  });

  const auto [batch_k, heads_kv, tokens_k, columns_k] = tokens.of_k();
  dk_.rows = dv_.rows = sampled_rows(batch_k * heads_kv, tokens_k, most_rows);
  dk_.allocate(p.dim_qk);
  dv_.allocate(p.dim_v);
  parallel(default_executor(), static_cast<int32_t>(dk_.rows.size()), [&](int32_t i) {
    const auto [sequence, head_kv, key] = pairs.key(dk_.rows[static_cast<size_t>(i)]);
    std::vector<Sum> dk(static_cast<size_t>(p.dim_qk)), dv(static_cast<size_t>(p.dim_v));
    for (int64_t of_group = 0; of_group < p.group() * sequence.len_q; ++of_group) {
      const int64_t head = head_kv * p.group() + of_group / sequence.len_q;
      const cpu::Row row{sequence, head, head_kv, of_group % sequence.len_q};
      const KeyRange keys = pairs.keys_of(row);
      if (key < keys.begin || key >= keys.end) continue;
      const PairState pair = pairs.pair(row, state(row), key);
      if (pair.weight == 0) continue;
      for (int64_t d = 0; d < p.dim_qk; ++d) {
        const double q = pairs.q(row, d);
        dk[static_cast<size_t>(d)].add(pair.gradient * q, pair.rounding * q);
      }
      for (int64_t d = 0; d < p.dim_v; ++d) {
        const double term = pair.weight * pairs.d_out(row, d);
        dv[static_cast<size_t>(d)].add(term, term);
      }
    }
    for (size_t d = 0; p.values_in_keys && d < dv.size(); ++d) {
      dk[d].sum += dv[d].sum;
      dk[d].squares += dv[d].squares;
    }
    put_row(dk_, static_cast<size_t>(i), dk);
    put_row(dv_, static_cast<size_t>(i), dv);
  });

  d_sinks_.rows = all_rows({1, p.heads_q, 1, 1});
  d_sinks_.allocate(1);
  std::vector<Sum> d_sinks(static_cast<size_t>(p.heads_q));
  for (size_t i = 0; p.has_sinks && i < states.size(); ++i) {
    const cpu::Row row = pairs.row(static_cast<int64_t>(i));
    if (Pairs::is_empty_row(states[i])) continue;
    const double weight = Pairs::weight_of(cpu::sink_of(p, t, row), states[i]);
    d_sinks[static_cast<size_t>(row.head_q)].add(-weight * states[i].delta,
                                                 weight * states[i].delta_rounding);
  }
  put_row(d_sinks_, 0, d_sinks);
}

int64_t gradient_rows(const Problem& p, const Tensors& t) { return Tokens(p, t).rows(); }
int64_t gradient_keys(const Problem& p, const Tensors& t) { return Tokens(p, t).keys(); }

int64_t affordable_gradient_rows(const Problem& p) {
  const int64_t pairs = std::max(p.len_k, p.group() * p.len_q);
  return affordable_rows(static_cast<double>(pairs * (2 * p.dim_qk + p.dim_v)));
}

GradientDifference ExpectedGradients::compare(const GradientTensors& data) const {
  const Problem& p = data.problem_;
  const Tokens tokens(p, data.inputs_.tensors());
  GradientDifference difference;
  const auto report = [&](std::string message) {
    if (difference.message.empty()) difference.message = std::move(message);
  };
  const auto compare_tensor = [&](const char* name, const GuardedTensor& tensor, Dtype dtype,
                                  const Extents& extents, const Strides& stride,
                                  const Rows& expected) {
    const double tolerance = 2 * tolerance_of(p.dtype_q) + tolerance_of(dtype);
    double rounding_squares = 0, error_squares = 0, worst_error = 0;
    for (const float rounding : expected.roundings) {
      if (std::isfinite(rounding)) rounding_squares += static_cast<double>(rounding) * rounding;
    }
    const double rms = std::sqrt(
        rounding_squares / std::max<double>(1, static_cast<double>(expected.roundings.size())));
    for (size_t element = 0; element < expected.wanted.size(); ++element) {
      const float want = expected.wanted[element], rounding = expected.roundings[element];
      const auto dim = static_cast<size_t>(extents[3]);
      const int64_t row = expected.rows[element / dim], d = static_cast<int64_t>(element % dim);
      const int64_t pair = row / extents[2], i = row % extents[2];
      const int64_t b = pair / extents[1], h = pair % extents[1];
      const float have = load_element(tensor.data(), dtype, offset_of(stride, b, h, i, d));
      const auto at = [&] {
        return fmt::format("{}[{}, {}, {}, {}] is {}, expected {}", name, b, h, i, d, have, want);
      };
      if (std::isfinite(want) != std::isfinite(have)) {
        report(at());
        difference.tolerance = tolerance;
        difference.worst_share = difference.relative_rms = std::numeric_limits<double>::infinity();
      }
      if (!std::isfinite(want) || !std::isfinite(have)) continue;
      const double error = std::fabs(static_cast<double>(have) - want);
      error_squares += error * error;
      const double bound = 8 * tolerance * std::max<double>(rms, rounding) + smallest(dtype);
      if (error > bound) {
        report(fmt::format("{}: off by {:.3g}, bound {:.3g}", at(), error, bound));
      }
      worst_error = std::max(worst_error, error);
    }
    difference.largest = std::max(difference.largest, worst_error);
    const double share = worst_error <= smallest(dtype)
                             ? 0
                             : std::sqrt(error_squares / rounding_squares) / tolerance;
    if (difference.tolerance == 0 || share > difference.worst_share) {
      difference.worst_share = share;
      difference.relative_rms = share * tolerance;
      difference.tolerance = tolerance;
    }
    if (share > 1) {
      report(fmt::format("{} is off by {:.3g} of what is summed, tolerance {:.3g}", name,
                         share * tolerance, tolerance));
    }
  };
  compare_tensor("dq", data.dq_, p.dtype_q, tokens.of_q(), p.stride_dq, dq_);
  compare_tensor("dk", data.dk_, p.dtype_kv, tokens.of_k(), p.stride_dk, dk_);
  if (!p.values_in_keys) {
    compare_tensor("dv", data.dv_, p.dtype_kv, tokens.of_v(), p.stride_dv, dv_);
  }
  if (p.has_sinks) {
    compare_tensor("d_sinks", data.d_sinks_, Dtype::kF32, {1, p.heads_q, 1, 1}, {0, 1, 0, 0},
                   d_sinks_);
  }
  return difference;
}

}  // namespace wh
