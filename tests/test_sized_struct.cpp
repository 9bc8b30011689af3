// Structs of callers that were compiled against another version.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "api/sized_struct.h"
#include "widehead/widehead.h"

namespace {

// A struct in two versions, as two headers have it.
struct Old {
  size_t size;
  int32_t a;
  int32_t padding;
};
struct New {
  size_t size;
  int32_t a;
  int32_t padding;
  int64_t b;
};
constexpr wh::SizedStruct<Old> kOld{"thing", sizeof(Old), {0, 1, 0}};
constexpr wh::SizedStruct<New> kNew{"thing", sizeof(Old), {0, 1, 0, 7}};

TEST(SizedStruct, AnOlderCallerGetsTheDefaultsOfWhatItDoesNotKnow) {
  struct {
    Old old;
    int64_t after = 99;
  } caller;
  ASSERT_TRUE(wh::init_sized(kNew, reinterpret_cast<New*>(&caller.old), sizeof(Old)).ok());
  EXPECT_EQ(caller.old.size, sizeof(Old));
  EXPECT_EQ(caller.old.a, 1);
  EXPECT_EQ(caller.after, 99);
  caller.old.a = 5;
  New read{};
  ASSERT_TRUE(wh::read_sized(kNew, reinterpret_cast<const New*>(&caller.old), read).ok());
  EXPECT_EQ(read.a, 5);
  EXPECT_EQ(read.b, 7);
}

TEST(SizedStruct, ANewerCallerMayNotSetWhatTheLibraryDoesNotKnow) {
  New caller{};
  ASSERT_TRUE(wh::init_sized(kOld, reinterpret_cast<Old*>(&caller), sizeof(New)).ok());
  EXPECT_EQ(caller.size, sizeof(New));
  EXPECT_EQ(caller.b, 0);
  caller.a = 5;
  Old read{};
  ASSERT_TRUE(wh::read_sized(kOld, reinterpret_cast<const Old*>(&caller), read).ok());
  EXPECT_EQ(read.a, 5);
  caller.b = 3;
  const wh::Status status = wh::read_sized(kOld, reinterpret_cast<const Old*>(&caller), read);
  EXPECT_EQ(status.message(),
            "byte 16 of thing is 3; it belongs to a field that this version of the library does "
            "not have and must be 0");
}

TEST(SizedStruct, SizesThatNoVersionHasAreRefused) {
  wh_problem problem{};
  for (const size_t size : {size_t{0}, size_t{272}, size_t{65537}, SIZE_MAX}) {
    EXPECT_EQ(wh_problem_init(&problem, size), WH_INVALID_ARGUMENT) << size;
    EXPECT_NE(std::string(wh_last_error()).find("sizeof(wh_problem), 280 to 65536"),
              std::string::npos)
        << wh_last_error();
  }
  // A caller of the future, through the C ABI.
  struct {
    wh_problem problem;
    int64_t more[4];
  } caller;
  ASSERT_EQ(wh_problem_init(&caller.problem, sizeof(caller)), WH_OK) << wh_last_error();
  caller.problem.len_q = caller.problem.len_k = caller.problem.dim_qk = caller.problem.dim_v = 8;
  EXPECT_EQ(wh_problem_set_dense(&caller.problem), WH_OK) << wh_last_error();
  caller.more[2] = 1;
  EXPECT_EQ(wh_problem_set_dense(&caller.problem), WH_INVALID_ARGUMENT);
  const std::string named = "byte " + std::to_string(sizeof(wh_problem) + 16) + " of problem is 1";
  EXPECT_NE(std::string(wh_last_error()).find(named), std::string::npos)
      << wh_last_error();
}

}  // namespace
