// Measured costs of a device: a small table that corrects the kernels' formulas.
//
// A point says how far a kernel's measured time is from its formula at one shape. Between points
// the correction is interpolated in the logarithms of rows, keys, width and heads, so that the
// formula carries the shape of the curve and the table what this machine makes of it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "plan/kernel.h"

namespace wh {

// Where in the space of problems a cost was measured. Logarithms base 2.
struct CostFeatures {
  float rows = 0;     // len_q * group: the query rows that share a kv head
  float keys = 0;     // len_k
  float width = 0;    // dim_qk + dim_v
  float heads = 0;    // batch * heads_kv
  float visible = 0;  // share of the pairs that causal and window leave: 0 all, -1 half
  Dtype dtype_kv = Dtype::kF32;

  static CostFeatures of(const Problem& problem);
  bool operator==(const CostFeatures&) const = default;
};

struct CostPoint {
  CostFeatures at;
  float log2_ratio = 0;  // of measured to formula
  bool operator==(const CostPoint&) const = default;
};

// What a profile was measured on. A cached one is used only where all of it still holds.
struct ProfileIdentity {
  std::string device;   // model name of the CPU or the GPU
  std::string isa;      // instruction set, or compute capability
  std::string driver;   // of a GPU; empty for a CPU
  int32_t threads = 0;  // CPU cores, or SMs
  std::string library_version;
  bool operator==(const ProfileIdentity&) const = default;
};

// The first thing in which the two differ, for people: "threads: 8 then, 2 now". Empty: nothing.
std::string difference(const ProfileIdentity& then, const ProfileIdentity& now);

class Profile {
 public:
  Profile() = default;
  Profile(ProfileIdentity identity, std::string measured_on)
      : identity_(std::move(identity)), measured_on_(std::move(measured_on)) {}

  const ProfileIdentity& identity() const { return identity_; }
  const std::string& measured_on() const { return measured_on_; }  // a date
  const std::map<std::string, std::vector<CostPoint>>& points() const { return points_; }
  // Leaves out what cannot be a measurement, which from_json() refuses.
  void add(const std::string& kernel, const CostPoint& point);

  // What to multiply the kernel's formula by; 1 for a kernel that was not measured.
  double correction(const std::string& kernel, const CostFeatures& at) const;

  std::string to_json() const;
  // Messages name the member that is missing or wrong.
  static Result<Profile> from_json(const std::string& text);

 private:
  ProfileIdentity identity_;
  std::string measured_on_;
  std::map<std::string, std::vector<CostPoint>> points_;
};

}  // namespace wh
