#include "input/problem_flags.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "core/nearest_name.h"
#include "core/problem_fields.h"
#include "core/rounding.h"
#include "plan/backend.h"
#include "report/session.h"

namespace wh::cli {
namespace {

enum class Part {
  kShape,   // what a file's tensors say
  kOption,  // what a file's metadata may say, and a flag then says better
};

// One that is called as a field of the problem in JSON, with - for _, holds that field.
struct Flag {
  const char* name;
  std::string ProblemFlags::*value;
  Part part;
  const char* implied;  // what the bare flag means; null: it needs a value
  const char* help;
};

constexpr Flag kFlags[] = {
    {"batch", &ProblemFlags::batch, Part::kShape, nullptr, "batch entries (1)"},
    {"heads", &ProblemFlags::heads, Part::kShape, nullptr, "query heads, or query/kv heads: 64/2"},
    {"dim", &ProblemFlags::dim, Part::kShape, nullptr, "head dimension, or qk/v: 192/128"},
    {"queries", &ProblemFlags::queries, Part::kShape, nullptr, "query length"},
    {"keys", &ProblemFlags::keys, Part::kShape, nullptr, "key length (as many as queries)"},
    {"dtype", &ProblemFlags::dtype, Part::kShape, nullptr, "f32, f16 or bf16 (f16)"},
    {"kv-dtype", &ProblemFlags::kv_dtype, Part::kShape, nullptr,
     "type of k and v (as --dtype), or K/V: e4m3, int8, either with scales :tensor, :head, "
     ":token-head or :channel, q8_0, q4_0"},
    {"causal", &ProblemFlags::causal, Part::kOption, "bottom-right",
     "bottom-right (of the bare flag) or top-left"},
    {"window", &ProblemFlags::window, Part::kOption, nullptr,
     "LEFT,RIGHT keys around the diagonal; -1: all"},
    {"softcap", &ProblemFlags::softcap, Part::kOption, nullptr, "cap * tanh(score / cap)"},
    {"scale", &ProblemFlags::scale, Part::kOption, nullptr, "of the scores (1 / sqrt(dim))"},
    {"mask", &ProblemFlags::mask, Part::kShape, nullptr,
     "an array mask: boolean, additive or additive-f32"},
    {"sinks", &ProblemFlags::sinks, Part::kShape, "true",
     "one more logit a head in the denominator"},
    {"key-lengths", &ProblemFlags::key_lengths, Part::kShape, nullptr,
     "N,N,... one a batch entry, or one for all"},
    {"key-starts", &ProblemFlags::key_starts, Part::kShape, nullptr,
     "N,N,... one a batch entry, or one for all"},
    {"lengths", &ProblemFlags::lengths, Part::kShape, nullptr,
     "N,N,... keys of each sequence, which lie one after another or in --pages"},
    {"query-lengths", &ProblemFlags::query_lengths, Part::kShape, nullptr,
     "N,N,... queries of each sequence, which lie one after another"},
    {"pages", &ProblemFlags::pages, Part::kShape, nullptr,
     "keys lie in pages of so many, in random order"},
    {"log-sum-exp", &ProblemFlags::log_sum_exp, Part::kOption, "true", "write the log-sum-exp too"},
    {"values-in-keys", &ProblemFlags::values_in_keys, Part::kShape, "true",
     "v is the first columns of k: absorbed latent attention"},
    {"f32-out", &ProblemFlags::f32_out, Part::kOption, "true",
     "out is f32, whatever --dtype is: parts to be merged"},
    {"layout", &ProblemFlags::layout, Part::kShape, nullptr,
     "heads-first [b, heads, length, dim] or length-first [b, length, heads, dim]"},
    {"device", &ProblemFlags::device, Part::kOption, nullptr, "cpu, cuda or cuda:1 (cpu)"},
    {"model", &ProblemFlags::model, Part::kShape, nullptr, "shapes of a model: see `list models`"},
    {"context", &ProblemFlags::context, Part::kShape, nullptr, "keys, with --model"},
    {"backward", &ProblemFlags::backward, Part::kShape, "true",
     "the gradients of q, k, v and sinks in place of out"},
};

const Flag* find_flag(const std::string& name) {
  for (const Flag& flag : kFlags) {
    if (name == flag.name) return &flag;
  }
  return nullptr;
}

// Reads values and remembers the first thing that was wrong.
class ValueReader {
 public:
  Status status() const { return status_; }

  // Empty text is no integer; optional() is for what may be left out.
  int64_t integer(const char* name, const std::string& text,
                  int64_t low = std::numeric_limits<int64_t>::min(),
                  int64_t high = std::numeric_limits<int64_t>::max()) {
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc() && end == text.data() + text.size() && value >= low && value <= high) {
      return value;
    }
    const bool is_bounded = high != std::numeric_limits<int64_t>::max();
    fail(fmt::format("--{} is \"{}\"; it must be an integer{}", name, text,
                     is_bounded ? fmt::format(" from {} to {}", low, high) : ""));
    return 0;
  }
  int64_t optional(const char* name, const std::string& text, int64_t missing) {
    return text.empty() ? missing : integer(name, text);
  }
  float number(const char* name, const std::string& text) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    const auto rounded = static_cast<float>(value);
    if (*end != '\0') {
      fail(fmt::format("--{} is \"{}\"; it must be a number", name, text));
    } else if (std::isfinite(value) && (!std::isfinite(rounded) || (value != 0 && rounded == 0))) {
      // A softcap that became 0 would be none.
      fail(fmt::format("--{} is \"{}\"; it must be a number that an f32 holds", name, text));
    }
    return rounded;
  }
  bool yes(const char* name, const std::string& text) {
    if (text != "true" && text != "false") {
      fail(fmt::format("--{} is \"{}\"; it must be true or false", name, text));
    }
    return text == "true";
  }
  // "a/b", or "a" for both.
  std::pair<int64_t, int64_t> pair(const char* name, const std::string& text) {
    const size_t slash = text.find('/');
    const std::string second = slash == std::string::npos ? text : text.substr(slash + 1);
    if (slash == 0 || second.empty()) {
      fail(fmt::format("--{} is \"{}\"; it must be N or N/N", name, text));
      return {0, 0};
    }
    const int64_t first = integer(name, text.substr(0, slash));
    return {first, slash == std::string::npos ? first : integer(name, second)};
  }
  // "a,b,...": as many integers as there are commas, and one.
  std::vector<int64_t> integers(const char* name, const std::string& text, int64_t low,
                                int64_t high) {
    std::vector<int64_t> values;
    for (size_t begin = 0; begin <= text.size();) {
      const size_t end = std::min(text.find(',', begin), text.size());
      values.push_back(integer(name, text.substr(begin, end - begin), low, high));
      begin = end + 1;
    }
    return values;
  }
  template <typename Enum, size_t kCount>
  Enum choice(const char* name, const std::string& text, const Names<Enum, kCount>& table,
              Enum missing) {
    if (text.empty()) return missing;
    const auto value = table.value(text);
    if (!value) fail(fmt::format("--{} is \"{}\"; valid: {}", name, text, table.list()));
    return value.value_or(missing);
  }

  // A field of the problem, by what it may hold.
  template <typename Enum, size_t kCount>
  void field(const char* name, const std::string& text, const Choice<Enum, kCount>& field,
             Enum& value) {
    value = choice(name, text, field.values, value);
  }
  template <typename Integer>
  void field(const char* name, const std::string& text, const Whole& field, Integer& value) {
    value = static_cast<Integer>(integer(name, text, field.least, field.most));
  }
  void field(const char* name, const std::string& text, const Real&, float& value) {
    value = number(name, text);
  }
  void field(const char*, const std::string&, const StridesOf&, Strides&) {}  // --layout's

  void fail(const std::string& message) {
    if (status_.ok()) status_ = invalid(message);
  }

 private:
  Status status_;
};

enum class LayoutFlag { kHeadsFirst, kLengthFirst };
constexpr Names<LayoutFlag, 2> kLayouts{{"heads-first", "length-first"}};

Strides strides_of(LayoutFlag layout, int64_t heads, int64_t length, int64_t dim) {
  if (layout == LayoutFlag::kHeadsFirst) return dense_strides(heads, length, dim);
  Strides strides = dense_strides(length, heads, dim);
  std::swap(strides[1], strides[2]);
  return strides;
}

std::string flag_name(std::string json_name) {
  std::replace(json_name.begin(), json_name.end(), '_', '-');
  return json_name;
}

// The flags of one part that are a field of the problem each. What is not given keeps the problem's
// value. The device comes with an index: read_device(); k and v with scales: read_kv_dtype(); pages
// are told by their size: read_sequences().
void read_fields(const ProblemFlags& flags, Part part, Problem& p, ValueReader& read) {
  const auto given = [&](const char* json_name) -> const Flag* {
    const Flag* flag = find_flag(flag_name(json_name));
    const bool is_given = flag != nullptr && flag->part == part && !(flags.*flag->value).empty();
    const bool is_plain = is_given && flag->value != &ProblemFlags::device &&
                          flag->value != &ProblemFlags::kv_dtype &&
                          flag->value != &ProblemFlags::pages;
    return is_plain ? flag : nullptr;
  };
  visit_fields(
      [&](const auto& field, auto& value) {
        if (const Flag* flag = given(json_name(field))) {
          read.field(flag->name, flags.*flag->value, field, value);
        }
      },
      p);
  for (const Use& use : kUses) {
    // Those that are no switch hold the tensor's values: what is given is used.
    if (const Flag* flag = given(use.name)) {
      p.*use.field = flag->implied == nullptr || read.yes(flag->name, flags.*flag->value);
    }
  }
}

void read_device(const std::string& text, Problem& p, ValueReader& read) {
  if (text.empty()) return;
  const size_t colon = text.find(':');
  if (const auto device = kDevices.value(text.substr(0, colon))) {
    p.device = *device;
    p.device_index = 0;
    if (colon == std::string::npos) return;
    ValueReader index;
    p.device_index = static_cast<int32_t>(
        index.integer("device", text.substr(colon + 1), kDeviceIndex.least, kDeviceIndex.most));
    if (index.status().ok() && !backend(*device).is_host()) return;
  }
  std::string numbered;
  for (const Device device : kDevices.values()) {
    if (backend(device).is_host()) continue;
    numbered += fmt::format(", or {0}:0 to {0}:{1}", kDevices.name(device), kDeviceIndex.most);
  }
  read.fail(fmt::format("--device is \"{}\"; valid: {}{}", text, kDevices.list(), numbered));
}

// Of K or of V: a type, or a format with what shares a scale behind a colon.
void read_stored(const std::string& text, Problem& p, Quantised& format, Scales& scales,
                 ValueReader& read) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  const bool has_scales = colon != std::string::npos;
  if (const auto dtype = kDtypes.value(name); dtype && !has_scales) {
    p.dtype_kv = *dtype;
    return;
  }
  const auto quantised = kQuantiseds.value(name);
  const auto kind = has_scales ? kScales.value(text.substr(colon + 1)) : Scales::kNone;
  const bool is_scaled = quantised == Quantised::kE4m3 || quantised == Quantised::kInt8;
  if (!quantised || quantised == Quantised::kNone || !kind || (has_scales && !is_scaled)) {
    read.fail(
        fmt::format("--kv-dtype is \"{}\"; valid: {}, e4m3, int8, either with :tensor, :head, "
                    ":token-head or :channel behind it, q8_0, q4_0, or two of them, K/V",
                    text, kDtypes.list()));
    return;
  }
  format = *quantised;
  scales = *kind;
}

void read_kv_dtype(const std::string& text, Problem& p, ValueReader& read) {
  p.dtype_kv = p.dtype_q;
  if (text.empty()) return;
  const size_t slash = text.find('/');
  const std::string k = text.substr(0, slash);
  const std::string v = slash == std::string::npos ? k : text.substr(slash + 1);
  read_stored(k, p, p.quantised_k, p.scales_k, read);
  const Dtype dtype_k = p.dtype_kv;
  read_stored(v, p, p.quantised_v, p.scales_v, read);
  const bool are_elements = kDtypes.value(k).has_value() && kDtypes.value(v).has_value();
  if (are_elements && p.dtype_kv != dtype_k) {
    read.fail(
        fmt::format("--kv-dtype is \"{}\"; K and V must be of one type where neither is "
                    "quantised",
                    text));
  }
}

std::vector<int32_t> read_per_batch(const char* name, const std::string& text, int64_t most,
                                    int64_t batch, ValueReader& read) {
  if (text.empty()) return {};
  const std::vector<int64_t> values = read.integers(name, text, 0, most);
  if (values.size() != 1 && static_cast<int64_t>(values.size()) != batch) {
    read.fail(fmt::format("--{} has {} values; it must have 1 or as many as the batch, {}", name,
                          values.size(), batch));
  }
  return {values.begin(), values.end()};
}

// One length a sequence.
struct Lengths {
  std::vector<int32_t> each;
  std::vector<int32_t> offsets;  // where each sequence's tokens begin, were they packed

  int64_t most() const { return *std::max_element(each.begin(), each.end()); }
  int64_t total() const { return offsets.back(); }
  int64_t pages(int64_t size) const {
    int64_t pages = 0;
    for (const int64_t length : each) pages += divide_up(length, size);
    return pages;
  }
};

Lengths lengths_of(const char* name, const std::vector<int64_t>& values, ValueReader& read) {
  Lengths lengths{{values.begin(), values.end()}, {0}};
  int64_t total = 0;
  for (const int64_t length : values) {
    total += length;
    lengths.offsets.push_back(static_cast<int32_t>(std::min(total, kMaxLength)));
  }
  if (total > kMaxLength) {
    read.fail(fmt::format("--{} adds up to {}; it must be at most {}", name, total, kMaxLength));
  }
  return lengths;
}

// Of --lengths or --query-lengths, which the number of sequences follows from.
Lengths read_lengths(const char* name, const std::string& text, const char* in_place_of,
                     const std::string& other, ValueReader& read) {
  if (!other.empty()) {
    read.fail(fmt::format("--{} has no effect with --{}, which has one for each sequence",
                          in_place_of, name));
  }
  return lengths_of(name, read.integers(name, text, 0, kMaxLength), read);
}

// Packed queries, packed keys and paged ones, and how many sequences there are.
void read_sequences(const ProblemFlags& flags, Request& request, ValueReader& read) {
  Problem& p = request.problem;
  const bool has_lengths = !flags.lengths.empty(), has_pages = !flags.pages.empty();
  std::optional<int64_t> count;
  const auto counted = [&](const char* name, const Lengths& lengths) {
    const auto have = static_cast<int64_t>(lengths.each.size());
    if (!flags.batch.empty()) {
      read.fail(fmt::format("--batch has no effect with --{}, which has {} sequences", name, have));
    } else if (count && *count != have) {
      read.fail(fmt::format("--{} has {} sequences; --query-lengths has {}", name, have, *count));
    }
    count = p.batch = have;
  };
  if (!flags.query_lengths.empty()) {
    const Lengths lengths =
        read_lengths("query-lengths", flags.query_lengths, "queries", flags.queries, read);
    counted("query-lengths", lengths);
    p.query_layout = QueryLayout::kPacked;
    p.len_q = lengths.most();
    p.total_q = lengths.total();
    request.query_offsets = lengths.offsets;
  }
  if (!has_lengths && !has_pages) return;
  if (!flags.key_lengths.empty()) {
    read.fail(
        fmt::format("--key-lengths has no effect with --{0}; --lengths says how many keys each "
                    "sequence has",
                    has_lengths ? "lengths" : "pages"));
  }
  Lengths lengths;
  if (has_lengths) {
    lengths = read_lengths("lengths", flags.lengths, "keys", flags.keys, read);
    counted("lengths", lengths);
    p.len_k = lengths.most();
  } else {
    if (flags.keys.empty() && flags.queries.empty()) {
      read.fail("--lengths is missing: how many keys each sequence has in its pages");
    }
    lengths = lengths_of(
        "keys", std::vector<int64_t>(static_cast<size_t>(std::max<int64_t>(1, p.batch)), p.len_k),
        read);
  }
  if (!has_pages) {
    p.key_layout = KeyLayout::kPacked;
    p.total_k = lengths.total();
    request.key_offsets = lengths.offsets;
    return;
  }
  p.key_layout = KeyLayout::kPaged;
  p.page_size = read.integer("pages", flags.pages, 1, kMaxLength);
  p.has_key_lengths = true;
  request.key_lengths = lengths.each;
  if (!read.status().ok()) return;
  p.pages = std::max<int64_t>(1, lengths.pages(p.page_size));
  p.stride_page_table = p.pages_a_sequence();
}

// Each page of the pool is one sequence's; entries past a sequence's last are none of the pool's.
std::vector<int32_t> shuffled_pages(const Problem& p, const std::vector<int32_t>& key_lengths,
                                    uint64_t seed) {
  std::vector<int32_t> pool(static_cast<size_t>(p.pages));
  std::iota(pool.begin(), pool.end(), 0);
  std::shuffle(pool.begin(), pool.end(), std::mt19937_64(seed));
  std::vector<int32_t> table(static_cast<size_t>(p.batch * p.stride_page_table), -1);
  auto next = pool.begin();
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = key_lengths[static_cast<size_t>(b)];
    const int64_t used = divide_up(length, p.page_size);
    std::copy_n(next, used, table.begin() + b * p.stride_page_table);
    next += used;
  }
  return table;
}

// What is not given keeps the problem's value.
void read_options(const ProblemFlags& flags, Problem& p, ValueReader& read) {
  read_fields(flags, Part::kOption, p, read);
  read_device(flags.device, p, read);
  if (flags.window.empty()) return;
  const auto window = read.integers("window", flags.window, kWindowLeft.least, kWindowLeft.most);
  if (window.size() != 2) {
    read.fail(fmt::format("--window is \"{}\"; it must be LEFT,RIGHT", flags.window));
    return;
  }
  p.window_left = window[0];
  p.window_right = window[1];
  if (p.causal != Causal::kNone && p.window_right > 0) {
    read.fail(
        fmt::format("--window is \"{}\", but --causal hides every key to the right; RIGHT "
                    "must be 0 or -1 beside it",
                    flags.window));
  }
}

Result<Request> read_request(const ProblemFlags& flags) {
  ValueReader read;
  Request request;
  Problem& p = request.problem;
  const std::string& queries = flags.query_lengths.empty() ? flags.queries : flags.query_lengths;
  for (const auto& [name, text] :
       {std::pair{"heads", &flags.heads}, {"dim", &flags.dim}, {"queries", &queries}}) {
    if (text->empty()) read.fail(fmt::format("--{} is missing", name));
  }
  std::tie(p.heads_q, p.heads_kv) = read.pair("heads", flags.heads);
  std::tie(p.dim_qk, p.dim_v) = read.pair("dim", flags.dim);
  p.len_q = read.optional("queries", flags.queries, 0);
  p.len_k = read.optional("keys", flags.keys, p.len_q);
  p.dtype_q = Dtype::kF16;
  read_fields(flags, Part::kShape, p, read);
  read_kv_dtype(flags.kv_dtype, p, read);
  p.scale = 1 / std::sqrt(static_cast<float>(std::max<int64_t>(1, p.dim_qk)));
  read_options(flags, p, read);
  if (!read.status().ok()) return read.status();
  read_sequences(flags, request, read);
  const auto layout = [&](bool is_dense) {  // packed tokens and pages lie token by token
    return read.choice("layout", flags.layout, kLayouts,
                       is_dense ? LayoutFlag::kHeadsFirst : LayoutFlag::kLengthFirst);
  };
  const LayoutFlag of_queries = layout(p.query_layout == QueryLayout::kDense);
  const LayoutFlag of_keys = layout(p.key_layout == KeyLayout::kDense);
  const int64_t tokens_q = query_storage(p).length, tokens_k = key_storage(p).length;
  p.stride_q = strides_of(of_queries, p.heads_q, tokens_q, p.dim_qk);
  p.stride_k = strides_of(of_keys, p.heads_kv, tokens_k, p.dim_qk);
  p.stride_v = p.values_in_keys ? p.stride_k : strides_of(of_keys, p.heads_kv, tokens_k, p.dim_v);
  p.stride_out = strides_of(of_queries, p.heads_q, tokens_q, p.dim_v);
  p.stride_scales_k = dense_scales_strides(p, p.scales_k, p.dim_qk);
  p.stride_scales_v =
      p.values_in_keys ? p.stride_scales_k : dense_scales_strides(p, p.scales_v, p.dim_v);
  // One mask for all batch entries and heads: what models make.
  if (p.mask != MaskKind::kNone) p.stride_mask = {0, 0, p.len_k, 1};
  if (!flags.backward.empty() && read.yes("backward", flags.backward)) {
    if (!flags.log_sum_exp.empty()) {
      read.fail("--log-sum-exp has no effect with --backward, which always reads it");
    }
    turn_backward(p);
  }
  if (!read.status().ok()) return read.status();
  if (p.wants_log_sum_exp) request.details += ", log-sum-exp";
  if (!flags.layout.empty() && of_keys == LayoutFlag::kLengthFirst)
    request.details += ", [batch, length, heads, dim]";
  if (Status status = validate(p); !status.ok()) return status;
  if (p.key_layout != KeyLayout::kPaged) {
    request.key_lengths = read_per_batch("key-lengths", flags.key_lengths, p.len_k, p.batch, read);
  }
  request.key_starts = read_per_batch("key-starts", flags.key_starts, kMaxLength, p.batch, read);
  if (!read.status().ok()) return read.status();
  return request;
}

// Values given on the command line replace those of a table's row.
ProblemFlags merged(ProblemFlags row, const ProblemFlags& overrides) {
  for (const Flag& flag : kFlags) {
    if (!(overrides.*flag.value).empty()) row.*flag.value = overrides.*flag.value;
  }
  return row;
}

std::string text_of(const Json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

std::vector<std::string> keys_of(const Json& object) {
  std::vector<std::string> names;
  for (const auto& [name, value] : object.items()) names.push_back(name);
  return names;
}

Status unknown_name(const char* what, const std::string& name, const Json& table) {
  return invalid(
      fmt::format("{} \"{}\" is unknown; did you mean \"{}\"? `widehead list {}s` lists "
                  "all",
                  what, name, nearest_name(name, keys_of(table)), what));
}

constexpr Names<Phase, 3> kPhases{{"any", "prefill", "decode"}};

Result<std::vector<Request>> read_model(const ProblemFlags& flags) {
  const auto model = models().find(flags.model);
  if (model == models().end()) return unknown_name("model", flags.model, models());
  if (flags.context.empty()) return invalid("--context is missing: how many keys the cache holds");
  if (!flags.keys.empty()) {
    return invalid("--keys has no effect with --model; --context says how many keys there are");
  }
  if (!flags.lengths.empty()) {
    return invalid("--lengths has no effect with --model; --context says how many keys there are");
  }
  ValueReader read;  // where it is still by its name
  read.integer("context", flags.context, 0, std::numeric_limits<int32_t>::max());
  WH_RETURN_IF_ERROR(read.status());
  std::vector<Request> requests;
  for (const Json& layer : (*model)["layers"]) {
    ProblemFlags row;
    for (const auto& [name, value] : layer.items()) {
      if (const Flag* flag = find_flag(name)) row.*flag->value = text_of(value);
    }
    row.causal = "bottom-right";
    if (flags.query_lengths.empty()) row.queries = "1";
    row.keys = flags.context;
    row = merged(row, flags);
    Result<Request> request = read_request(row);
    if (!request.ok()) return request.status();
    request->label = layer["kind"].get<std::string>();
    request->layers = layer["count"].get<int64_t>();
    request->cached_layers = layer.value("cached", request->layers);
    if (layer.contains("phase")) request->phase = *kPhases.value(layer["phase"].get<std::string>());
    requests.push_back(std::move(*request));
  }
  return requests;
}

// Multiplies the lists of one row out, field by field, the first list slowest.
std::vector<ProblemFlags> expand(const Json& row) {
  std::vector<ProblemFlags> expanded{{}};
  for (const auto& [name, value] : row.items()) {
    const Flag* flag = find_flag(name);
    if (flag == nullptr || value.is_object()) continue;
    std::vector<ProblemFlags> next;
    for (const ProblemFlags& flags : expanded) {
      for (const Json& one : value.is_array() ? value : Json::array({value})) {
        next.push_back(flags);
        next.back().*flag->value = text_of(one);
      }
    }
    expanded = std::move(next);
  }
  if (const auto queries = row.find("queries"); queries != row.end() && queries->is_object()) {
    for (ProblemFlags& flags : expanded) {
      const int64_t keys = std::stoll(flags.keys);
      flags.queries = std::to_string(std::min(keys, queries->value("at_most", keys)));
    }
  }
  return expanded;
}

}  // namespace

Input Request::input(uint64_t seed) const {
  Input input;
  input.problem = problem;
  input.key_lengths = per_batch(key_lengths, problem.batch);
  input.key_starts = per_batch(key_starts, problem.batch);
  input.query_offsets = query_offsets;
  input.key_offsets = key_offsets;
  if (problem.key_layout == KeyLayout::kPaged) {
    input.page_table = shuffled_pages(problem, input.key_lengths, seed);
  }
  input.is_hostile = false;
  input.seed = seed;
  return input;
}

void turn_backward(Problem& p) {
  p.pass = Pass::kBackward;
  p.stride_d_out = p.stride_out;
  p.stride_dq = p.stride_q;
  p.stride_dk = p.stride_k;
  if (!p.values_in_keys) p.stride_dv = p.stride_v;
}

std::vector<int32_t> per_batch(const std::vector<int32_t>& values, int64_t batch) {
  if (values.size() != 1) return values;
  return std::vector<int32_t>(static_cast<size_t>(batch), values.front());
}

void add_problem_flags(CLI::App& app, ProblemFlags& flags) {
  for (const Flag& flag : kFlags) {
    const std::string name = std::string("--") + flag.name;
    CLI::Option* option =
        flag.implied == nullptr
            ? app.add_option(name, flags.*flag.value, flag.help)
            : app.add_flag(name + "{" + flag.implied + "}", flags.*flag.value, flag.help);
    option->group("PROBLEM")->check(refuse_empty);
  }
}

Result<std::vector<Request>> read_requests(const ProblemFlags& flags) {
  if (!flags.model.empty()) return read_model(flags);
  if (!flags.context.empty()) {
    return invalid("--context has no effect without --model; --keys says how many keys there are");
  }
  Result<Request> request = read_request(flags);
  if (!request.ok()) return request.status();
  return std::vector<Request>{std::move(*request)};
}

Status override_options(const ProblemFlags& flags, Problem& p) {
  for (const Flag& flag : kFlags) {
    if (flag.part == Part::kOption || (flags.*flag.value).empty()) continue;
    if (flag.value == &ProblemFlags::backward) {
      return invalid("--backward has no effect with a file, which holds no gradient of out");
    }
    return invalid(fmt::format(
        "--{} has no effect with a file, whose tensors say what it would; leave one of the two out",
        flag.name));
  }
  ValueReader read;
  read_options(flags, p, read);
  return read.status();
}

Result<std::vector<Request>> read_suite(const std::string& suite, const ProblemFlags& overrides) {
  const auto found = suites().find(suite);
  if (found == suites().end()) return unknown_name("suite", suite, suites());
  for (const auto& [name, text] :
       {std::pair{"model", &overrides.model}, {"context", &overrides.context}}) {
    if (!text->empty()) return invalid(fmt::format("--{} has no effect with a suite", name));
  }
  std::vector<Request> requests;
  for (const Json& row : (*found)["rows"]) {
    for (const ProblemFlags& flags : expand(row)) {
      Result<Request> request = read_request(merged(flags, overrides));
      if (!request.ok()) return request.status();
      requests.push_back(std::move(*request));
    }
  }
  return requests;
}

}  // namespace wh::cli
