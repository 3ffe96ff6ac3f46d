// The kernels of test_kernels.cc as a GPU has them: dispatches over all experts of a wave, numbers given one by one.
#include "fake_device.h"

#include <cstdint>

namespace cfmoe::test {
namespace {

float small(uint64_t x) { return static_cast<float>((x * 0x9e3779b97f4a7c15U >> 40) % 64); }

template <typename T>
T* as(std::byte* data) {
  return reinterpret_cast<T*>(data);
}

using Buffers = std::vector<std::byte*>;
using Scalars = std::vector<int32_t>;

void embed(const Buffers& b, const Scalars& s) {
  for (int64_t t = 0; t < s[0]; ++t) {
    const auto token = static_cast<uint64_t>(as<int32_t>(b[0])[t]);
    for (uint64_t j = 0; j < 64; ++j) as<float>(b[2])[t * 64 + j] = small(token * 64 + j);
  }
}

void attend(const Buffers& b, const Scalars& s) {
  auto* hidden = as<float>(b[0]);
  auto *keys = as<uint16_t>(b[1]), *values = as<uint16_t>(b[2]);
  for (int64_t t = 0; t < s[1]; ++t) {
    const int64_t at = s[0] + t;
    keys[at] = values[at] = static_cast<uint16_t>(static_cast<int64_t>(hidden[t * 64]) & 63);
    uint64_t sum = 0;
    for (int64_t i = 0; i <= at; ++i) sum = sum * 31 + keys[i] + values[i];
    for (uint64_t j = 0; j < 64; ++j) hidden[t * 64 + j] = small(static_cast<uint64_t>(hidden[t * 64 + j]) + sum + j);
  }
}

void route_logits(const Buffers& b, const Scalars& s) {
  for (int64_t t = 0; t < s[0]; ++t) {
    const float* hidden = as<float>(b[0]) + t * 64;
    for (int64_t e = 0; e < 16; ++e) as<float>(b[1])[t * 16 + e] = hidden[e] * 0.25F;
    for (int64_t j = 0; j < 32; ++j) as<int32_t>(b[2])[t * 32 + j] = static_cast<int32_t>(hidden[j]);
  }
}

void gate_up(const Buffers& b, const Scalars& s) {
  for (int32_t e = s[0]; e < s[0] + s[1]; ++e) {
    const int32_t* work = as<int32_t>(b[4]) + e * 4;
    const uint32_t* record = as<uint32_t>(b[2]) + work[0];
    for (int64_t r = 0; r < work[2]; ++r) {
      const int32_t* activation = as<int32_t>(b[0]) + int64_t{as<int32_t>(b[1])[work[1] + r]} * 32;
      for (int64_t j = 0; j < 16; ++j) {
        as<int32_t>(b[3])[(work[3] + r) * 16 + j] =
            static_cast<int32_t>((record[j] + static_cast<uint32_t>(activation[j])) & 0xffff);
      }
    }
  }
}

void down(const Buffers& b, const Scalars& s) {
  for (int32_t e = s[0]; e < s[0] + s[1]; ++e) {
    const int32_t* work = as<int32_t>(b[4]) + e * 4;
    const uint32_t* record = as<uint32_t>(b[2]) + work[0] + 3200;
    for (int64_t r = 0; r < work[2]; ++r) {
      float* out = as<float>(b[3]) + int64_t{as<int32_t>(b[1])[work[1] + r]} * 64;
      for (int64_t j = 0; j < 64; ++j) {
        out[j] = small(static_cast<uint32_t>(as<int32_t>(b[0])[(work[3] + r) * 16 + j % 16]) + (record[j] & 0xffffU));
      }
    }
  }
}

void combine(const Buffers& b, const Scalars& s) {
  for (int64_t t = 0; t < s[0]; ++t) {
    const float* weights = as<float>(b[1]) + t * 2;
    const float* rows = as<float>(b[0]) + t * 128;
    for (int64_t j = 0; j < 64; ++j) {
      const float mixed = weights[0] * rows[j] + weights[1] * rows[64 + j];
      as<float>(b[2])[t * 64 + j] += static_cast<float>(static_cast<int32_t>(mixed));
    }
  }
}

void head(const Buffers& b, const Scalars&) {
  uint64_t sum = 0;
  for (int64_t j = 0; j < 64; ++j) sum = sum * 131 + static_cast<uint64_t>(as<float>(b[0])[j]);
  for (uint64_t v = 0; v < 100; ++v) as<float>(b[1])[v] = small(sum + v * 7919) + static_cast<float>(v) * 0.001F;
}

}  // namespace

const std::map<std::string, FakeFunction>& fake_kernels() {
  static const std::map<std::string, FakeFunction> kernels = {
      {"embed", embed},     {"attend", attend}, {"route_logits", route_logits}, {"gate_up", gate_up}, {"down", down},
      {"combine", combine}, {"head", head}};
  return kernels;
}

}  // namespace cfmoe::test
