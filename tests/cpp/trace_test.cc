// The trace file, and the recorder that gathers it.
#include "trace/trace.h"

#include <doctest/doctest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "expect_error.h"
#include "fixtures.h"
#include "trace/trace_recorder.h"
#include "trace_fixture.h"

using namespace cfmoe;
using namespace cfmoe::test;

namespace {

void check_equal(const TraceSegment& a, const TraceSegment& b) {
  CHECK(a.tokens == b.tokens);
  CHECK(a.phase == b.phase);
  CHECK(a.begins_sample == b.begins_sample);
  CHECK(a.hand_over == b.hand_over);
  CHECK(a.position == b.position);
}

void check_equal(const std::vector<TraceSegment>& a, const std::vector<TraceSegment>& b) {
  REQUIRE(a.size() == b.size());
  for (size_t i = 0; i < a.size(); ++i) check_equal(a[i], b[i]);
}

void check_equal(const Trace& a, const Trace& b) {
  CHECK(a.layers == b.layers);
  CHECK(a.experts == b.experts);
  CHECK(a.top_k == b.top_k);
  CHECK(a.chunk_size == b.chunk_size);
  CHECK(a.slots == b.slots);
  CHECK(a.expert_bytes == b.expert_bytes);
  CHECK(a.policy == b.policy);
  check_equal(a.segments, b.segments);
  CHECK(a.ids == b.ids);
  CHECK(a.scores == b.scores);
  CHECK(a.tokens() == b.tokens());
}

// Two samples, five segments, nine tokens.
Trace sound_trace(const TraceShape& shape = {}) {
  Trace trace = random_trace(shape, joined(conversation({{3, 2}, {1, 1}}), conversation({{0, 2}})), 1);
  trace.chunk_size = 256;
  trace.slots = 12;
  trace.expert_bytes = 4096;
  trace.policy = "lru";
  return trace;
}

// Where the ids of sound_trace() begin.
constexpr size_t kIds = kTraceHeader + 5 * 16;

void expect_refused(const std::vector<uint8_t>& bytes, const std::string& message) {
  expect_error([&] { parse_trace(bytes, "some.trace"); }, {"some.trace: ", message});
}

// A change to the header or the segments that the digests do not give away.
template <typename T>
void expect_refused_with(size_t offset, T value, const std::string& message, const Trace& trace = sound_trace()) {
  std::vector<uint8_t> bytes = format_trace(trace);
  put(&bytes, offset, value);
  reseal(&bytes);
  expect_refused(bytes, message);
}

}  // namespace

TEST_CASE("trace: what is written is read") {
  for (const TraceShape& shape : std::vector<TraceShape>{{1, 1, 1, true},
                                                         {3, 8, 2, true},
                                                         {3, 8, 8, false},
                                                         {2, 256, 256, false},
                                                         {2, 257, 3, true},
                                                         {1024, 3, 1, true},
                                                         {1, 65535, 2, false}}) {
    CAPTURE(shape.experts);
    const Trace trace = sound_trace(shape);
    const std::vector<uint8_t> bytes = format_trace(trace);
    const size_t id_bytes = shape.experts <= 256 ? 1 : 2;
    CHECK(bytes.size() == kIds + trace.ids.size() * id_bytes + trace.scores.size() * 2);
    const Trace again = parse_trace(bytes, "memory");
    check_equal(again, trace);
    CHECK(format_trace(again) == bytes);
  }
  // Numbers at their ends.
  Trace trace = sound_trace();
  trace.chunk_size = trace.slots = 0xFFFFFFFF;
  trace.expert_bytes = 0xFFFFFFFFFFFFFFFF;
  trace.policy = std::string(32, '~');
  trace.segments.back().position = uint64_t{1} << 48;
  check_equal(parse_trace(format_trace(trace), "memory"), trace);
  trace.policy = "";
  trace.chunk_size = trace.slots = 0;
  trace.expert_bytes = 0;
  check_equal(parse_trace(format_trace(trace), "memory"), trace);
}

TEST_CASE("trace: the bytes are those of the document") {
  // Three tokens, one layer, top-2 of 3 experts; a prompt of two and a decoded token.
  Trace trace;
  trace.layers = 1;
  trace.experts = 3;
  trace.top_k = 2;
  trace.chunk_size = 256;
  trace.slots = 12;
  trace.expert_bytes = 4096;
  trace.policy = "lru";
  trace.segments = conversation({{2, 1}});
  trace.ids = {2, 0, 1, 2, 0, 1};
  trace.scores = {1, 2, 3, 4, 5, 6, 7, 8, 65535};
  std::vector<uint8_t> bytes(kTraceHeader + 2 * 16 + 6 + 18);
  std::memcpy(bytes.data(), "CFMOETRC", 8);
  const uint32_t words[] = {1, 1, 1, 3, 2, 1};  // version, scores, layers, experts, top_k, bytes of an id
  std::memcpy(bytes.data() + 8, words, sizeof words);
  put(&bytes, 32, uint64_t{3});  // tokens
  put(&bytes, 40, uint64_t{2});  // segments
  put(&bytes, 48, uint32_t{256});
  put(&bytes, 52, uint32_t{12});
  put(&bytes, 56, uint64_t{4096});
  std::memcpy(bytes.data() + 64, "lru", 3);
  put(&bytes, 128, uint32_t{2});
  put(&bytes, 132, uint8_t{0});
  put(&bytes, 133, uint8_t{3});  // begins a sample, hand-over follows
  put(&bytes, 144, uint32_t{1});
  put(&bytes, 148, uint8_t{1});
  put(&bytes, 152, uint64_t{2});
  const uint8_t ids[] = {2, 0, 1, 2, 0, 1};
  std::memcpy(bytes.data() + 160, ids, sizeof ids);
  std::memcpy(bytes.data() + 166, trace.scores.data(), 18);
  reseal(&bytes);
  CHECK(format_trace(trace) == bytes);
}

TEST_CASE("trace: every other length is refused") {
  std::vector<uint8_t> bytes = format_trace(sound_trace({2, 5, 2, true}));
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::string has = "has " + std::to_string(size) + " bytes";
    expect_refused(
        {bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size)},
        size < kTraceHeader ? has + ", too few for a trace" : has + " instead of " + std::to_string(bytes.size()));
  }
  bytes.push_back(0);
  expect_refused(bytes, "instead of " + std::to_string(bytes.size() - 1) + "; record the trace again");
}

TEST_CASE("trace: every bit counts") {
  const std::vector<uint8_t> sound = format_trace(sound_trace({2, 5, 2, true}));
  for (size_t bit = 0; bit < 8 * sound.size(); ++bit) {
    std::vector<uint8_t> bytes = sound;
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    const size_t place = bit / 8;
    const char* message = "is damaged";
    if (place < 8) {
      message = "is not a routing trace; give a file that cfmoe profile or cfmoe run --trace wrote";
    } else if (place < 12) {
      message = "has format version";
    } else if (place < 112) {
      message = "its header is damaged";
    } else if (place < kTraceHeader) {
      message = "its header does not end in zeros";
    }
    expect_refused(bytes, message);
  }
}

TEST_CASE("trace: numbers of the header out of bounds") {
  const size_t size = format_trace(sound_trace()).size();
  const std::string instead = "has " + std::to_string(size) + " bytes instead of ";
  expect_refused_with(8, uint32_t{2}, "has format version 2, this runtime reads 1");
  expect_refused_with(12, uint32_t{2}, "the flag word is 2, not between 0 and 1");
  expect_refused_with(12, uint32_t{0}, instead);
  expect_refused_with(16, uint32_t{0}, "the number of layers is 0, not between 1 and 1024");
  expect_refused_with(16, uint32_t{1025}, "the number of layers is 1025, not between 1 and 1024");
  expect_refused_with(16, uint32_t{2}, instead);
  expect_refused_with(20, uint32_t{0}, "the number of experts is 0, not between 1 and 65535");
  expect_refused_with(20, uint32_t{65536}, "the number of experts is 65536, not between 1 and 65535");
  expect_refused_with(20, uint32_t{257}, "the size of an id is 1, not between 2 and 2");
  expect_refused_with(24, uint32_t{0}, "top_k is 0, not between 1 and 8");
  expect_refused_with(24, uint32_t{9}, "top_k is 9, not between 1 and 8");
  expect_refused_with(24, uint32_t{257}, "top_k is 257, not between 1 and 256", sound_trace({1, 300, 2, false}));
  expect_refused_with(28, uint32_t{2}, "the size of an id is 2, not between 1 and 1");
  expect_refused_with(28, uint32_t{1}, "the size of an id is 1, not between 2 and 2", sound_trace({1, 300, 2, false}));
  expect_refused_with(32, uint64_t{0}, "has no tokens");
  expect_refused_with(32, uint64_t{1} << 32, "claims 4294967296 tokens in 5 segments");
  expect_refused_with(32, ~uint64_t{0}, "claims 18446744073709551615 tokens in 5 segments");
  expect_refused_with(32, (uint64_t{1} << 32) - 1, instead);
  expect_refused_with(32, uint64_t{8}, instead);
  expect_refused_with(40, uint64_t{0}, "claims 9 tokens in 0 segments");
  expect_refused_with(40, uint64_t{10}, "claims 9 tokens in 10 segments");
  expect_refused_with(40, uint64_t{4}, instead);
  expect_refused_with(64, uint8_t{0}, "the policy's name is not padded with zeros");
  expect_refused_with(95, uint8_t{'u'}, "the policy's name is not padded with zeros");
  for (const uint8_t byte : {0x1F, 0x20, 0x7F, 0x80, 0xFF})
    expect_refused_with(65, byte, "the policy's name is not ASCII");
}

TEST_CASE("trace: a claim of the largest sizes is refused by the file's length") {
  std::vector<uint8_t> bytes = format_trace(sound_trace({1, 300, 2, true}));
  put(&bytes, 16, uint32_t{1024});
  put(&bytes, 20, uint32_t{65535});
  put(&bytes, 24, uint32_t{256});
  put(&bytes, 32, (uint64_t{1} << 32) - 1);
  put(&bytes, 40, (uint64_t{1} << 32) - 1);
  reseal(&bytes);
  // 128 + 16 t + 1,024 * 256 * 2 t + 1,024 * 65,535 * 2 t with t = 2^32 - 1.
  expect_refused(bytes, "instead of 578703824608823408;");
}

TEST_CASE("trace: segments that contradict") {
  // Segment i begins at 128 + 16 i: tokens (u32), phase (u8), flags (u8), zero (u16), position (u64).
  const auto offset = [](size_t segment, size_t field) { return kTraceHeader + 16 * segment + field; };
  expect_refused_with(offset(0, 0), uint32_t{0}, "segment 0 has 0 of the trace's 9 tokens");
  expect_refused_with(offset(0, 0), uint32_t{10}, "segment 0 has 10 of the trace's 9 tokens");
  expect_refused_with(offset(2, 0), ~uint32_t{0}, "segment 2 has 4294967295 of the trace's 9 tokens");
  expect_refused_with(offset(4, 0), uint32_t{3}, "segment 4 has 3 of the trace's 9 tokens");
  expect_refused_with(offset(4, 0), uint32_t{1}, "the segments have 8 tokens, the header 9");
  expect_refused_with(offset(0, 4), uint8_t{2}, "segment 0 has an unknown phase or flag");
  expect_refused_with(offset(1, 5), uint8_t{4}, "segment 1 has an unknown phase or flag");
  expect_refused_with(offset(3, 5), uint8_t{128}, "segment 3 has an unknown phase or flag");
  expect_refused_with(offset(2, 6), uint16_t{256}, "segment 2 has an unknown phase or flag");
  expect_refused_with(offset(1, 5), uint8_t{2}, "segment 1 is decode with a hand-over");
  expect_refused_with(offset(0, 5), uint8_t{2}, "the first segment does not begin a sample");
  expect_refused_with(offset(0, 8), (uint64_t{1} << 48) + 1, "segment 0 begins at position 281474976710657");
  expect_refused_with(offset(1, 8), uint64_t{2}, "segment 1 begins at position 2");
  expect_refused_with(offset(4, 5), uint8_t{0}, "segment 4 begins at position 0");
  // A gap within a sample is allowed.
  std::vector<uint8_t> bytes = format_trace(sound_trace());
  put(&bytes, offset(3, 8), uint64_t{1000});
  reseal(&bytes);
  CHECK(parse_trace(bytes, "memory").segments[3].position == 1000);
}

TEST_CASE("trace: ids that contradict") {
  // 3 layers, top-2 of 8: token 1, layer 2 begins 10 ids behind the first.
  const Trace trace = sound_trace();
  const uint16_t first = trace.ids[10];
  expect_refused_with(kIds + 10, uint8_t{8}, "token 1, layer 2 names expert 8 of 8");
  expect_refused_with(kIds + 10, uint8_t{255}, "token 1, layer 2 names expert 255 of 8");
  expect_refused_with(kIds + 11, static_cast<uint8_t>(first),
                      "token 1, layer 2 names expert " + std::to_string(first) + " twice");
  const Trace wide = sound_trace({3, 300, 2, true});
  expect_refused_with(kIds + 20, uint16_t{300}, "token 1, layer 2 names expert 300 of 300", wide);
  expect_refused_with(kIds + 20, wide.ids[11], "token 1, layer 2 names expert " + std::to_string(wide.ids[11]), wide);
  // The last expert of a layer of 256 is one, and the last id of all is looked at.
  const Trace full = sound_trace({1, 256, 1, false});
  expect_refused_with(kIds + 8, uint8_t{200}, "token 8, layer 0 names expert 200", sound_trace({1, 200, 1, false}));
  std::vector<uint8_t> bytes = format_trace(full);
  put(&bytes, kIds + 8, uint8_t{255});
  reseal(&bytes);
  CHECK(parse_trace(bytes, "memory").ids.back() == 255);
}

TEST_CASE("trace: writing") {
  const TempDir directory;
  const Trace trace = sound_trace();
  const std::string path = directory / "a.trace";
  const auto names = [&] {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(directory.path()))
      names.push_back(entry.path().filename());
    return names;
  };
  write_file(path, "what was there before");
  write_trace(trace, path);
  const std::string text = read_file(path);
  check_equal(parse_trace({reinterpret_cast<const uint8_t*>(text.data()), text.size()}, path), trace);
  CHECK(names() == std::vector<std::string>{"a.trace"});

  expect_error([&] { write_trace(trace, directory / "none/b.trace"); },
               {"cannot write " + (directory / "none/b.trace"), "No such file or directory", "choose another place"});
  std::filesystem::create_directory(directory / "c.trace");
  expect_error([&] { write_trace(trace, directory / "c.trace"); }, {"c.trace", "choose another place"});
  Trace empty;
  empty.layers = empty.experts = empty.top_k = 1;
  expect_error([&] { write_trace(empty, directory / "d.trace"); }, {"no token has been run", "generate first"});
  CHECK(names().size() == 2);
}

namespace {

// Two layers, top-1 of 8, chunks of four tokens.
Trace recorder_header() {
  Trace trace;
  trace.layers = 2;
  trace.experts = 8;
  trace.top_k = 1;
  trace.chunk_size = 4;
  return trace;
}

// One whole pass over `tokens` tokens.
void pass(TraceRecorder& recorder, Phase phase, uint32_t tokens, uint64_t position) {
  for (int32_t layer = 0; layer < 2; ++layer) {
    std::vector<int32_t> ids;
    for (uint32_t token = 0; token < tokens; ++token)
      ids.push_back(static_cast<int32_t>((position + token + static_cast<uint64_t>(layer) * 3) % 8));
    recorder.note(phase, layer, ids, {}, position);
  }
}

void prefill(TraceRecorder& recorder, uint32_t tokens, uint64_t position) {
  pass(recorder, Phase::kPrefill, tokens, position);
}

void decode(TraceRecorder& recorder, uint32_t tokens, uint64_t position) {
  for (uint32_t i = 0; i < tokens; ++i) pass(recorder, Phase::kDecode, 1, position + i);
}

}  // namespace

TEST_CASE("recorder: chunks and tokens become segments, layers become tokens") {
  TraceRecorder recorder(recorder_header(), false);
  CHECK(!recorder.wants_scores());
  CHECK(recorder.trace().segments.empty());
  prefill(recorder, 4, 0);
  prefill(recorder, 4, 4);
  prefill(recorder, 2, 8);
  recorder.note_hand_over();
  decode(recorder, 3, 10);
  prefill(recorder, 4, 13);
  recorder.note_hand_over();
  decode(recorder, 1, 17);
  const Trace& trace = recorder.trace();
  check_equal(trace.segments, conversation({{10, 3}, {4, 1}}));
  REQUIRE(trace.ids.size() == 36);
  CHECK(trace.tokens() == 18);
  for (size_t token = 0; token < 18; ++token) {
    CHECK(trace.ids[2 * token] == token % 8);
    CHECK(trace.ids[2 * token + 1] == (token + 3) % 8);
  }
  CHECK(trace.scores.empty());
  check_equal(parse_trace(format_trace(trace), "memory"), trace);
}

TEST_CASE("recorder: prompts that chunk otherwise stay apart") {
  TraceRecorder recorder(recorder_header(), false);
  const Phase prompt = Phase::kPrefill;
  // A chunk that was not full: what follows begins a chunk of its own.
  prefill(recorder, 3, 0);
  prefill(recorder, 4, 3);
  check_equal(recorder.trace().segments, {{3, prompt, true, false, 0}, {4, prompt, false, false, 3}});
  // Full chunks: one call or two make no difference.
  prefill(recorder, 4, 7);
  prefill(recorder, 1, 11);
  check_equal(recorder.trace().segments, {{3, prompt, true, false, 0}, {9, prompt, false, false, 3}});
  // Hand-over lies between, and a gap.
  prefill(recorder, 4, 12);
  recorder.note_hand_over();
  prefill(recorder, 4, 16);
  prefill(recorder, 4, 40);
  check_equal(recorder.trace().segments, {{3, prompt, true, false, 0},
                                          {9, prompt, false, false, 3},
                                          {4, prompt, false, true, 12},
                                          {4, prompt, false, false, 16},
                                          {4, prompt, false, false, 40}});
}

TEST_CASE("recorder: a cancelled pass leaves no trace") {
  TraceRecorder recorder(recorder_header(), false);
  prefill(recorder, 4, 0);
  recorder.note(Phase::kPrefill, 0, std::vector<int32_t>{7, 7}, {}, 4);
  // The session goes on with another prompt from the same position.
  prefill(recorder, 3, 4);
  check_equal(recorder.trace().segments, {{7, Phase::kPrefill, true, false, 0}});
  CHECK(recorder.trace().ids.size() == 14);
  CHECK(recorder.trace().ids[8] == 4);
  // Half a pass at the end, and one that lacks its beginning.
  recorder.note(Phase::kDecode, 0, std::vector<int32_t>{7}, {}, 7);
  CHECK(recorder.trace().tokens() == 7);
  TraceRecorder other(recorder_header(), false);
  other.note(Phase::kDecode, 1, std::vector<int32_t>{7}, {}, 7);
  CHECK(other.trace().ids.empty());
  decode(other, 2, 0);
  check_equal(other.trace().segments, {{2, Phase::kDecode, true, false, 0}});
}

TEST_CASE("recorder: samples") {
  TraceRecorder recorder(recorder_header(), false);
  recorder.begin_sample();
  recorder.note_hand_over();
  decode(recorder, 2, 0);
  // The same position and phase, yet a new sample; nothing lies between the two beginnings.
  recorder.begin_sample();
  recorder.begin_sample();
  decode(recorder, 1, 2);
  recorder.note_hand_over();
  recorder.begin_sample();
  prefill(recorder, 4, 0);
  // Of the sample that has begun there is nothing to hand over yet.
  recorder.begin_sample();
  recorder.note_hand_over();
  prefill(recorder, 4, 0);
  recorder.note_hand_over();
  check_equal(recorder.trace().segments, {{2, Phase::kDecode, true, false, 0},
                                          {1, Phase::kDecode, true, false, 2},
                                          {4, Phase::kPrefill, true, false, 0},
                                          {4, Phase::kPrefill, true, true, 0}});
}

TEST_CASE("recorder: scores go with their tokens") {
  Trace header = recorder_header();
  header.experts = 3;
  TraceRecorder recorder(header, true);
  CHECK(recorder.wants_scores());
  recorder.note(Phase::kPrefill, 0, std::vector<int32_t>{0, 1}, std::vector<uint16_t>{1, 2, 3, 4, 5, 6}, 0);
  recorder.note(Phase::kPrefill, 1, std::vector<int32_t>{2, 0}, std::vector<uint16_t>{7, 8, 9, 10, 11, 12}, 0);
  CHECK(recorder.trace().ids == std::vector<uint16_t>{0, 2, 1, 0});
  CHECK(recorder.trace().scores == std::vector<uint16_t>{1, 2, 3, 7, 8, 9, 4, 5, 6, 10, 11, 12});
  // Not asked for them, it does not keep them.
  TraceRecorder other(header, false);
  other.note(Phase::kPrefill, 0, std::vector<int32_t>{0, 1}, std::vector<uint16_t>{1, 2, 3, 4, 5, 6}, 0);
  other.note(Phase::kPrefill, 1, std::vector<int32_t>{2, 0}, std::vector<uint16_t>{7, 8, 9, 10, 11, 12}, 0);
  CHECK(other.trace().ids == recorder.trace().ids);
  CHECK(other.trace().scores.empty());
}
