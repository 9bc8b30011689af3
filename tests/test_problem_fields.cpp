// The list of a problem's fields leaves none out, and its ranges are what every way in says.
#include <gtest/gtest.h>

#include "core/problem_fields.h"
#include "widehead/widehead.h"

namespace wh {
namespace {

bool differ_in_a_listed_field(const Problem& a, const Problem& b) {
  bool differ = false;
  visit_fields([&](const auto&, const auto& of_a, const auto& of_b) { differ |= of_a != of_b; }, a,
               b);
  for (const Use& use : kUses) differ |= a.*use.field != b.*use.field;
  return differ;
}

// Whatever makes two problems unequal is listed. The lowest bit, as no other is a bool's.
TEST(ProblemFields, LeaveNoMemberOut) {
  const Problem given;
  size_t members = 0;
  for (size_t i = 0; i < sizeof(Problem); ++i) {
    Problem changed = given;
    reinterpret_cast<unsigned char*>(&changed)[i] ^= 1;
    if (changed == given) continue;  // padding
    ++members;
    EXPECT_TRUE(differ_in_a_listed_field(given, changed)) << "byte " << i;
  }
  EXPECT_GT(members, 250u);
}

TEST(ProblemFields, DenseStridesNeedExtentsInTheirRange) {
  struct {
    int64_t wh_problem::*field;
    int64_t value;
    const char* message;
  } const wrong[] = {
      {&wh_problem::batch, -1, "batch is -1; it must be between 0 and 2147483647"},
      {&wh_problem::heads_kv, 0, "heads_kv is 0; it must be between 1 and 2147483647"},
      {&wh_problem::len_k, int64_t{1} << 31,
       "len_k is 2147483648; it must be between 0 and 2147483647"},
      {&wh_problem::dim_v, 1025, "dim_v is 1025; it must be between 1 and 1024"}};
  for (const auto& one : wrong) {
    wh_problem problem;
    ASSERT_EQ(wh_problem_init(&problem, sizeof(problem)), WH_OK);
    problem.dim_qk = problem.dim_v = 64;
    ASSERT_EQ(wh_problem_set_dense(&problem), WH_OK);
    problem.*one.field = one.value;
    EXPECT_EQ(wh_problem_set_dense(&problem), WH_INVALID_ARGUMENT);
    EXPECT_STREQ(wh_last_error(), one.message);
  }
}

}  // namespace
}  // namespace wh
