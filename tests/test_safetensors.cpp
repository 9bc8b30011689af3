// The reader against files that lie.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "input/safetensors.h"
#include "input/stored_problem.h"

namespace wh::cli {
namespace {

std::vector<std::byte> file_of(const std::string& header, size_t data_bytes,
                               int64_t claimed_header = -1) {
  const uint64_t length =
      claimed_header < 0 ? header.size() : static_cast<uint64_t>(claimed_header);
  std::vector<std::byte> file(8 + header.size() + data_bytes);
  std::memcpy(file.data(), &length, 8);
  std::memcpy(file.data() + 8, header.data(), header.size());
  return file;
}

TEST(Safetensors, ReadsATensorAndMetadata) {
  const auto file = file_of(
      R"({"__metadata__":{"scale":"0.5"},"q":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})",
      8);
  const auto view = parse_safetensors(file);
  ASSERT_TRUE(view.ok()) << view.status().message();
  EXPECT_EQ(view->metadata.at("scale"), "0.5");
  EXPECT_EQ(view->tensors.at("q").shape, (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(view->tensors.at("q").bytes.size(), 8u);
}

TEST(Safetensors, RefusesFilesThatLie) {
  const auto message = [](const std::vector<std::byte>& file) {
    const auto view = parse_safetensors(file);
    return view.ok() ? "" : view.status().message();
  };
  const auto entry = [&](const std::string& text, size_t data_bytes = 8) {
    return message(file_of(R"({"q":)" + text + "}", data_bytes));
  };
  const std::pair<std::string, const char*> lies[] = {
      {message({}), "0 bytes"},
      {message(std::vector<std::byte>(7)), "7 bytes"},
      {message(file_of("{}", 0, 3)), "the header claims 3 bytes"},
      {message(file_of("{}", 0, std::numeric_limits<int64_t>::max())), "the header claims"},
      {message(file_of("nonsense", 0)), "not a JSON object"},
      {message(file_of("[1]", 0)), "not a JSON object"},
      {message(file_of(std::string(100000, '['), 0)), "not a JSON object"},
      {message(file_of(R"({"__metadata__":{"a":1}})", 0)), "__metadata__.a is not a string"},
      {entry("3"), "has no dtype"},
      {entry(R"({"dtype":"F33","shape":[2],"data_offsets":[0,8]})"), "\"F33\" is unknown"},
      {entry(R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})"), "shape is not a list"},
      {entry(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "size of its shape"},
      {entry(R"({"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]})"),
       "overflows"},
      {entry(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"), "takes 12 bytes"},
      {entry(R"({"dtype":"F32","shape":[2]})"), "has no data_offsets"},
      {entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), "not two positions"},
      {entry(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "outside"},
      {entry(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})"), "outside the 8 bytes"},
      {entry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
             R"("k":{"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
       "share data"},
  };
  for (const auto& [text, part] : lies) {
    EXPECT_NE(text.find(part), std::string::npos) << "wanted: " << part << "\ngot: " << text;
  }
}

TEST(Safetensors, NestingTakesNoStack) {
  constexpr size_t kDepth = 200000;  // deep enough to end the 8 MiB of a stack, a frame each
  const std::string deep = std::string(kDepth, '[') + std::string(kDepth, ']');
  const std::string q = R"({"q":{"dtype":"F32","shape":[2],"data_offsets":)";
  const std::pair<std::string, const char*> files[] = {
      {deep, "not a JSON object"},
      {R"({"q":)" + deep + "}", "has no dtype"},
      {R"({"q":{"dtype":)" + deep + "}}", "has no dtype"},
      {R"({"q":{"dtype":"F32","shape":)" + deep + "}}", "size of its shape"},
      {q + deep + "}}", "not two positions"},
      {q + "[" + deep + ",8]}}", "not two positions"},
      {R"({"__metadata__":{"a":)" + deep + "}}", "__metadata__.a is not a string"},
      // Brackets in a string are no nesting, and do not undo any.
      {R"({")" + std::string(kDepth, ']') + R"(":3,"q":{"data_offsets":)" + deep + "}}",
       "has no dtype"},
  };
  for (const auto& [header, part] : files) {
    const auto view = parse_safetensors(file_of(header, 8));
    ASSERT_FALSE(view.ok());
    EXPECT_NE(view.status().message().find(part), std::string::npos) << "wanted: " << part;
  }
  const auto view =
      parse_safetensors(file_of(R"({"__metadata__":{"note":"\"[[)" + deep + R"("}})", 0));
  EXPECT_TRUE(view.ok()) << view.status().message();
}

TEST(Safetensors, ManyEntriesAreReadInLinearTime) {
  std::string header = "{";
  for (int i = 0; i < 200000; ++i) {
    header += fmt::format(R"("{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},)", i);
  }
  header.back() = '}';
  const auto view = parse_safetensors(file_of(header, 0));
  ASSERT_TRUE(view.ok()) << view.status().message();
  EXPECT_EQ(view->tensors.size(), 200000u);
}

TEST(Safetensors, WritesWhatItReads) {
  const std::string path = testing::TempDir() + "widehead_roundtrip.safetensors";
  const std::vector<float> data{1, 2, 3};
  ASSERT_TRUE(write_safetensors(path, {{"out", "F32", {3}, std::as_bytes(std::span(data))}}).ok());
  const auto file = MappedFile::open(path);
  ASSERT_TRUE(file.ok());
  const auto view = parse_safetensors(file->bytes());
  ASSERT_TRUE(view.ok()) << view.status().message();
  EXPECT_EQ(0, std::memcmp(view->tensors.at("out").bytes.data(), data.data(), 12));
  EXPECT_NE(write_safetensors("/nowhere/x", {}).message().find("cannot write /nowhere/x"),
            std::string::npos);
  EXPECT_NE(MappedFile::open("/nowhere/x").status().message().find("cannot open"),
            std::string::npos);
}

TEST(ProblemFile, ABatchOfNoneMayHaveAnySizes) {
  const std::string huge = "[0,4611686018427387904,4611686018427387904,64]";
  const std::string tensor = R"({"dtype":"F32","shape":)" + huge + R"(,"data_offsets":[0,0]})";
  const auto file =
      file_of(R"({"q":)" + tensor + R"(,"k":)" + tensor + R"(,"v":)" + tensor +
                  R"(,"mask":{"dtype":"U8","shape":)" + huge + R"(,"data_offsets":[0,0]}})",
              0);
  const auto view = parse_safetensors(file);
  ASSERT_TRUE(view.ok()) << view.status().message();
  EXPECT_FALSE(read_problem(*view, {}).ok());
}

std::string problem_message(const std::string& header, size_t data_bytes) {
  const std::string path = testing::TempDir() + "widehead_problem.safetensors";
  const auto bytes = file_of(header, data_bytes);
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<long>(bytes.size()));
  const auto stored = read_problem_file(path, {});
  return stored.ok() ? "" : stored.status().message();
}

TEST(ProblemFile, NamesTheTensorThatDoesNotFit) {
  const std::string q = R"("q":{"dtype":"F32","shape":[1,2,1,4],"data_offsets":[0,32]})";
  const std::string k = R"("k":{"dtype":"F32","shape":[1,1,2,4],"data_offsets":[32,64]})";
  const std::string v = R"("v":{"dtype":"F32","shape":[1,1,2,4],"data_offsets":[64,96]})";
  const auto with = [&](const std::string& more) {
    return problem_message("{" + q + "," + k + "," + v + more + "}", 160);
  };
  EXPECT_EQ(with(""), "");
  EXPECT_NE(problem_message("{" + q + "," + k + "}", 96).find("no tensor \"v\""),
            std::string::npos);
  EXPECT_NE(with(R"(,"sinks":{"dtype":"F32","shape":[3],"data_offsets":[96,108]})")
                .find("sinks is [3]; the other tensors make it [2]"),
            std::string::npos);
  EXPECT_NE(with(R"(,"mask":{"dtype":"U8","shape":[1,1,1,3],"data_offsets":[96,99]})")
                .find("size 3 must be 1 or 2"),
            std::string::npos);
  EXPECT_NE(with(R"(,"mask":{"dtype":"I64","shape":[1,1,1,2],"data_offsets":[96,112]})")
                .find("mask is I64"),
            std::string::npos);
  EXPECT_NE(with(R"(,"__metadata__":{"causal":"sideways"})").find("causal is \"sideways\""),
            std::string::npos);
  for (const char* window : {"1e30", "nan", "1.7", "99999999999999999999", ""}) {
    EXPECT_NE(with(fmt::format(R"(,"__metadata__":{{"window_left":"{}"}})", window))
                  .find("window_left is \"" + std::string(window) + "\"; it must be an integer"),
              std::string::npos)
        << window;
  }
  EXPECT_NE(with(R"(,"__metadata__":{"window_left":"-2"})").find("window_left is -2"),
            std::string::npos);
  EXPECT_EQ(with(R"(,"__metadata__":{"window_left":"16777217"})"), "");
  EXPECT_NE(with(R"(,"__metadata__":{"scale":"big"})").find("scale is \"big\""), std::string::npos);
}

}  // namespace
}  // namespace wh::cli
