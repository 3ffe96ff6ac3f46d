// The trace file: every number is bounded before it is used, and nothing behind the header is believed before its
// digest.
#include "trace/trace.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "artifact/checksum.h"
#include "error.h"

namespace cfmoe {
namespace {

static_assert(std::endian::native == std::endian::little, "the trace format is little-endian");

constexpr char kMagic[8] = {'C', 'F', 'M', 'O', 'E', 'T', 'R', 'C'};
constexpr uint32_t kVersion = 1, kScoresFlag = 1;
constexpr size_t kHeaderBytes = 128, kSegmentBytes = 16, kPolicyBytes = 32, kSealedBytes = 104;
constexpr uint32_t kMaxLayers = 1024, kMaxExperts = 65535, kMaxTopK = 256, kMaxByteIds = 256;
constexpr uint8_t kBeginsSample = 1, kHandOver = 2;
constexpr const char* kRemedy = "; record the trace again";

class Reader {
 public:
  Reader(std::span<const uint8_t> bytes, const std::string& name) : bytes_(bytes), name_(name) {}
  [[noreturn]] void fail(const std::string& reason) const { throw Error(name_ + ": " + reason + kRemedy); }
  template <typename T>
  T take() {
    T value;
    std::memcpy(&value, take_bytes(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::span<const uint8_t> take_bytes(size_t size) {
    if (size > bytes_.size() - place_) fail("ends after " + std::to_string(bytes_.size()) + " bytes");
    place_ += size;
    return bytes_.subspan(place_ - size, size);
  }
  uint32_t take_between(const char* what, uint32_t low, uint32_t high) {
    const auto value = take<uint32_t>();
    if (value < low || value > high)
      fail(std::string(what) + " is " + std::to_string(value) + ", not between " + std::to_string(low) + " and " +
           std::to_string(high));
    return value;
  }

 private:
  std::span<const uint8_t> bytes_;
  const std::string& name_;
  size_t place_ = 0;
};

class Writer {
 public:
  template <typename T>
  void put(T value) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
    out.insert(out.end(), bytes, bytes + sizeof(T));
  }
  std::vector<uint8_t> out;
};

uint32_t id_bytes_of(uint32_t experts) { return experts <= kMaxByteIds ? 1 : 2; }

std::string take_policy(Reader& reader) {
  const std::span<const uint8_t> field = reader.take_bytes(kPolicyBytes);
  std::string policy;
  for (const uint8_t byte : field) {
    if (byte == 0) break;
    if (byte <= ' ' || byte > '~') reader.fail("the policy's name is not ASCII");
    policy += static_cast<char>(byte);
  }
  for (size_t i = policy.size(); i < field.size(); ++i) {
    if (field[i] != 0) reader.fail("the policy's name is not padded with zeros");
  }
  return policy;
}

std::vector<TraceSegment> take_segments(Reader& reader, uint64_t count, uint64_t tokens) {
  std::vector<TraceSegment> segments;
  uint64_t sum = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const std::string where = "segment " + std::to_string(i);
    TraceSegment segment;
    segment.tokens = reader.take<uint32_t>();
    const auto phase = reader.take<uint8_t>(), flags = reader.take<uint8_t>();
    const auto zero = reader.take<uint16_t>();
    segment.position = reader.take<uint64_t>();
    if (segment.tokens == 0 || segment.tokens > tokens - sum)
      reader.fail(where + " has " + std::to_string(segment.tokens) + " of the trace's " + std::to_string(tokens) +
                  " tokens");
    if (phase > 1 || (flags & ~(kBeginsSample | kHandOver)) != 0 || zero != 0)
      reader.fail(where + " has an unknown phase or flag");
    segment.phase = static_cast<Phase>(phase);
    segment.begins_sample = (flags & kBeginsSample) != 0;
    segment.hand_over = (flags & kHandOver) != 0;
    if (segment.hand_over && segment.phase == Phase::kDecode) reader.fail(where + " is decode with a hand-over");
    if (i == 0 && !segment.begins_sample) reader.fail("the first segment does not begin a sample");
    // Positions ascend within a sample and end far below 2^64.
    const uint64_t least = segment.begins_sample ? 0 : segments.back().position + segments.back().tokens;
    if (segment.position < least || segment.position > (uint64_t{1} << 48))
      reader.fail(where + " begins at position " + std::to_string(segment.position));
    sum += segment.tokens;
    segments.push_back(segment);
  }
  if (sum != tokens)
    reader.fail("the segments have " + std::to_string(sum) + " tokens, the header " + std::to_string(tokens));
  return segments;
}

void check_ids(const Trace& trace, const Reader& reader) {
  const auto top_k = static_cast<size_t>(trace.top_k);
  for (size_t group = 0; group < trace.ids.size(); group += top_k) {
    for (size_t i = group; i < group + top_k; ++i) {
      const auto where = [&] {
        const size_t row = group / top_k, layers = static_cast<size_t>(trace.layers);
        return "token " + std::to_string(row / layers) + ", layer " + std::to_string(row % layers);
      };
      if (trace.ids[i] >= trace.experts)
        reader.fail(where() + " names expert " + std::to_string(trace.ids[i]) + " of " + std::to_string(trace.experts));
      for (size_t j = group; j < i; ++j) {
        if (trace.ids[j] == trace.ids[i])
          reader.fail(where() + " names expert " + std::to_string(trace.ids[i]) + " twice");
      }
    }
  }
}

[[noreturn]] void fail_to_write(const std::string& path, const std::string& part) {
  const int reason = errno;
  std::remove(part.c_str());
  throw Error("cannot write " + path + ": " + std::strerror(reason) +
              "; choose another place or free some space there");
}

}  // namespace

Trace parse_trace(std::span<const uint8_t> bytes, const std::string& name) {
  Reader reader(bytes, name);
  if (bytes.size() < kHeaderBytes) reader.fail("has " + std::to_string(bytes.size()) + " bytes, too few for a trace");
  if (std::memcmp(reader.take_bytes(sizeof kMagic).data(), kMagic, sizeof kMagic) != 0)
    throw Error(name + ": is not a routing trace; give a file that cfmoe profile or cfmoe run --trace wrote");
  if (const auto version = reader.take<uint32_t>(); version != kVersion)
    reader.fail("has format version " + std::to_string(version) + ", this runtime reads " + std::to_string(kVersion));
  uint64_t seal;
  std::memcpy(&seal, bytes.data() + kSealedBytes, sizeof seal);
  if (seal != xxh3_64(bytes.data(), kSealedBytes)) reader.fail("its header is damaged");

  Trace trace;
  const uint32_t flags = reader.take_between("the flag word", 0, kScoresFlag);
  const uint32_t layers = reader.take_between("the number of layers", 1, kMaxLayers);
  const uint32_t experts = reader.take_between("the number of experts", 1, kMaxExperts);
  const uint32_t top_k = reader.take_between("top_k", 1, std::min(experts, kMaxTopK));
  const uint32_t id_bytes = reader.take_between("the size of an id", id_bytes_of(experts), id_bytes_of(experts));
  const auto tokens = reader.take<uint64_t>(), segments = reader.take<uint64_t>();
  trace.layers = static_cast<int32_t>(layers);
  trace.experts = static_cast<int32_t>(experts);
  trace.top_k = static_cast<int32_t>(top_k);
  trace.chunk_size = reader.take<uint32_t>();
  trace.slots = reader.take<uint32_t>();
  trace.expert_bytes = reader.take<uint64_t>();
  trace.policy = take_policy(reader);
  const auto digest = reader.take<uint64_t>();
  reader.take<uint64_t>();  // the seal
  for (const uint8_t byte : reader.take_bytes(16)) {
    if (byte != 0) reader.fail("its header does not end in zeros");
  }
  if (tokens == 0) reader.fail("has no tokens");
  if (tokens > 0xFFFFFFFFU || segments == 0 || segments > tokens)
    reader.fail("claims " + std::to_string(tokens) + " tokens in " + std::to_string(segments) + " segments");

  // At most 2^32 tokens of 2^10 layers, 2^8 ids and 2^16 scores: every sum below fits 64 bits.
  const uint64_t id_count = tokens * layers * top_k;
  const uint64_t score_count = (flags & kScoresFlag) != 0 ? tokens * layers * experts : 0;
  const uint64_t expected = kHeaderBytes + segments * kSegmentBytes + id_count * id_bytes + score_count * 2;
  if (bytes.size() != expected)
    reader.fail("has " + std::to_string(bytes.size()) + " bytes instead of " + std::to_string(expected));
  if (digest != xxh3_64(bytes.data() + kHeaderBytes, bytes.size() - kHeaderBytes)) reader.fail("is damaged");

  trace.segments = take_segments(reader, segments, tokens);
  const std::span<const uint8_t> ids = reader.take_bytes(id_count * id_bytes);
  trace.ids.resize(id_count);
  if (id_bytes == 1) {
    std::copy(ids.begin(), ids.end(), trace.ids.begin());
  } else {
    std::memcpy(trace.ids.data(), ids.data(), ids.size());
  }
  trace.scores.resize(score_count);
  if (score_count > 0) std::memcpy(trace.scores.data(), reader.take_bytes(score_count * 2).data(), score_count * 2);
  check_ids(trace, reader);
  return trace;
}

std::vector<uint8_t> format_trace(const Trace& trace) {
  Writer body;
  for (const TraceSegment& segment : trace.segments) {
    body.put(segment.tokens);
    body.put(static_cast<uint8_t>(segment.phase));
    body.put(static_cast<uint8_t>((segment.begins_sample ? kBeginsSample : 0) | (segment.hand_over ? kHandOver : 0)));
    body.put(uint16_t{0});
    body.put(segment.position);
  }
  const uint32_t id_bytes = id_bytes_of(static_cast<uint32_t>(trace.experts));
  for (const uint16_t id : trace.ids) {
    if (id_bytes == 1) {
      body.put(static_cast<uint8_t>(id));
    } else {
      body.put(id);
    }
  }
  for (const uint16_t score : trace.scores) body.put(score);

  Writer header;
  header.out.insert(header.out.end(), kMagic, kMagic + sizeof kMagic);
  header.put(kVersion);
  header.put(trace.scores.empty() ? uint32_t{0} : kScoresFlag);
  for (const int32_t count : {trace.layers, trace.experts, trace.top_k}) header.put(static_cast<uint32_t>(count));
  header.put(id_bytes);
  header.put(trace.tokens());
  header.put(static_cast<uint64_t>(trace.segments.size()));
  header.put(trace.chunk_size);
  header.put(trace.slots);
  header.put(trace.expert_bytes);
  header.out.insert(header.out.end(), trace.policy.begin(), trace.policy.end());
  header.out.resize(kSealedBytes - sizeof(uint64_t));
  header.put(xxh3_64(body.out.data(), body.out.size()));
  header.put(xxh3_64(header.out.data(), header.out.size()));
  header.out.resize(kHeaderBytes);
  header.out.insert(header.out.end(), body.out.begin(), body.out.end());
  return std::move(header.out);
}

void write_trace(const Trace& trace, const std::string& path) {
  if (trace.ids.empty()) throw Error("cannot write " + path + ": no token has been run; generate first");
  const std::vector<uint8_t> bytes = format_trace(trace);
  const std::string part = path + "." + std::to_string(getpid()) + ".part";
  std::FILE* file = std::fopen(part.c_str(), "wbx");
  if (file == nullptr) fail_to_write(path, part);
  const bool written = std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && std::fflush(file) == 0;
  if (std::fclose(file) != 0 || !written) fail_to_write(path, part);
  if (std::rename(part.c_str(), path.c_str()) != 0) fail_to_write(path, part);
}

}  // namespace cfmoe
