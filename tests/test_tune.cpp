// `widehead tune` where it can go wrong: the old profile must survive whatever happens.
#include <fcntl.h>
#include <sys/file.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "support/command_line.h"

namespace wh {
namespace {

namespace fs = std::filesystem;

std::string read(const fs::path& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

class Tune : public testing::Test {
 protected:
  void SetUp() override {
    cache_ = fs::path(testing::TempDir()) / ("widehead_tune_" + std::to_string(getpid()));
    fs::remove_all(cache_);
    fs::create_directories(cache_);
    setenv("XDG_CACHE_HOME", cache_.c_str(), 1);
  }
  void TearDown() override {
    unsetenv("XDG_CACHE_HOME");
    fs::remove_all(cache_);
  }

  fs::path profile() const { return cache_ / "widehead" / "cpu.json"; }
  // One that holds here, by the program itself.
  std::string tuned(int seconds) const {
    const Outcome outcome = widehead("tune --seconds " + std::to_string(seconds));
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    return read(profile());
  }
  static size_t points(const std::string& text) {
    size_t count = 0;
    const auto json = nlohmann::json::parse(text);
    for (const auto& kernel : json["kernels"]) count += kernel.size();
    return count;
  }

  fs::path cache_;
};

TEST_F(Tune, RefusesAFolderThatCannotBeWritten) {
  const fs::path file = cache_ / "file";
  std::ofstream(file) << "not a folder";
  setenv("XDG_CACHE_HOME", file.c_str(), 1);
  const Outcome outcome = widehead("tune --seconds 1");
  EXPECT_EQ(outcome.code, 4);
  EXPECT_NE(outcome.err.find("cannot write in " + file.string()), std::string::npos) << outcome.err;
  EXPECT_NE(outcome.err.find("Not a directory"), std::string::npos) << outcome.err;
  EXPECT_EQ(read(file), "not a folder");
}

TEST_F(Tune, KeepsTheOldProfileWhenTheDiskIsFull) {
  const std::string old = tuned(1);
  // Files of at most 1 KiB, and no signal where one would grow beyond: as a full disk, write()
  // fails.
  const Outcome outcome = shell("trap '' XFSZ; ulimit -f 1; " WIDEHEAD_CLI " tune --seconds 1");
  EXPECT_EQ(outcome.code, 4);
  EXPECT_NE(outcome.err.find("cannot write " + profile().string()), std::string::npos)
      << outcome.err;
  EXPECT_EQ(read(profile()), old);
  for (const auto& entry : fs::directory_iterator(profile().parent_path())) {
    const std::string name = entry.path().filename();
    EXPECT_TRUE(name == "cpu.json" || name == "cpu.json.lock") << name << " was left behind";
  }
}

TEST_F(Tune, RefusesToRunTwiceAtOnce) {
  fs::create_directories(profile().parent_path());
  const int lock = open((profile().string() + ".lock").c_str(), O_WRONLY | O_CREAT, 0644);
  ASSERT_EQ(flock(lock, LOCK_EX), 0);
  const Outcome outcome = widehead("tune --seconds 1");
  EXPECT_EQ(outcome.code, 4);
  EXPECT_NE(outcome.err.find("another widehead tune is running"), std::string::npos) << outcome.err;
  EXPECT_FALSE(fs::exists(profile()));
  close(lock);
  EXPECT_EQ(widehead("tune --seconds 1").code, 0);
}

TEST_F(Tune, KeepsWhatWasMeasuredBeforeCtrlC) {
  const size_t before = points(tuned(3));
  ASSERT_GT(before, 0u);
  Outcome outcome;
  // A busy machine may need longer until there is something to keep.
  for (int seconds = 2; seconds <= 16; seconds *= 2) {
    outcome = widehead_interrupted("tune --seconds 40", seconds);
    if (outcome.code == 0) break;
    EXPECT_NE(outcome.err.find("stopped before anything was measured"), std::string::npos)
        << outcome.err;
  }
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("before the interrupt"), std::string::npos) << outcome.out;
  // What this run did not reach is still there from the one before.
  EXPECT_GE(points(read(profile())), before);
  EXPECT_EQ(widehead("tune --show").code, 0);
}

TEST_F(Tune, ShowPrintsOneDocumentOrWhyThereIsNone) {
  Outcome outcome = widehead("tune --show");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_NE(outcome.err.find("no profile at"), std::string::npos) << outcome.err;
  const std::string text = tuned(1);
  outcome = widehead("tune --show --json");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(nlohmann::json::parse(outcome.out), nlohmann::json::parse(text));
  auto foreign = nlohmann::json::parse(text);
  foreign["threads"] = 999;
  std::ofstream(profile()) << foreign;
  outcome = widehead("tune --show");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_NE(outcome.err.find("threads: 999 then"), std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.out, "");
}

TEST_F(Tune, APlanSaysWhyItIgnoresTheProfile) {
  // A link to itself can be neither followed nor read.
  fs::create_directories(profile().parent_path());
  fs::create_symlink(profile(), profile());
  const Outcome outcome = widehead("plan --heads 2 --dim 64 --queries 16");
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("cpu.json cannot be read: "), std::string::npos) << outcome.out;
}

// What connects ranks: kept beside the profile, and taken by plans.
TEST_F(Tune, MeasuresTheLinkBetweenRanks) {
  const std::string plan = "plan --ranks 2 --heads 4/2 --dim 64 --queries 4096 --causal";
  const Outcome before = widehead(plan);
  EXPECT_EQ(before.code, 2);
  EXPECT_NE(before.err.find("--link is missing"), std::string::npos) << before.err;
  const Outcome one = widehead("tune --parallel threads --ranks 1");
  EXPECT_NE(one.err.find("--ranks is 1; a link takes at least 2"), std::string::npos) << one.err;
  const Outcome measured = widehead("tune --parallel threads --ranks 2 --json");
  ASSERT_EQ(measured.code, 0) << measured.err;
  const auto link = nlohmann::json::parse(measured.out);
  EXPECT_GT(link["gbytes_per_s"], 0.05);
  EXPECT_GT(link["latency_us"], 0);
  const Outcome after = widehead(plan);
  EXPECT_EQ(after.code, 0) << after.err;
  EXPECT_NE(after.out.find("between 2 ranks of threads"), std::string::npos) << after.out;
  EXPECT_FALSE(fs::exists(profile()));
}

}  // namespace
}  // namespace wh
