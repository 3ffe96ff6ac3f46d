// The one copy of an artifact's weights and of the KV cache, for the CPU, for a device, or for both.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "artifact/index.h"
#include "device/device.h"
#include "engine/plan.h"
#include "store/aligned_buffer.h"
#include "store/expert_store.h"

namespace cfmoe {

// Where pieces lie that each start at a multiple of an alignment, in as few blocks as their largest size allows.
struct BlockLayout {
  struct Piece {
    size_t block = 0;
    uint64_t offset = 0, size = 0;
  };
  std::vector<uint64_t> blocks;  // sizes
  std::vector<Piece> pieces;
  uint64_t total() const;
};
// Throws cfmoe::Error where a piece is larger than a block may be.
BlockLayout lay_out(std::span<const uint64_t> sizes, uint64_t alignment, uint64_t max_block);

// Keys and values: plain buffers, one pair per layer, of a fixed number of rows.
struct KvSizes {
  uint64_t k = 0, v = 0;  // bytes of one layer
  int32_t layers = 0;
};
// `context` rows, a multiple of 16.
KvSizes kv_sizes(const PlanKv& plan, int64_t context);

struct TensorPlace {
  void* host = nullptr;  // null where the host does not reach it
  device::View view;     // no buffer where no device is used
};

class ModelMemory {
 public:
  std::vector<TensorPlace> weights;  // by place in the index
  std::vector<TensorPlace> k, v;     // by layer
  std::string warning;               // of reading; "" if none

  // Throws cfmoe::Error where a program's buffer is larger than the cache of its layer.
  void check_kv(const PlanBuffer& buffer, const SymbolValues& values) const;

  // In host memory. Reads and verifies weights.bin; throws cfmoe::Error naming the file and the tensor.
  static ModelMemory on_host(const std::string& path, const ArtifactIndex& index, const PlanKv& kv, int64_t context,
                             IoMode io);
  static uint64_t host_weights_bytes(uint64_t file_bytes);
  static uint64_t host_kv_bytes(const PlanKv& kv, int64_t context);

  // In a device's memory.
  static ModelMemory on_device(device::Device& device, const std::string& path, const ArtifactIndex& index,
                               const PlanKv& kv, int64_t context, IoMode io);
  static BlockLayout device_weights(const device::Facts& facts, const ArtifactIndex& index);
  static BlockLayout device_kv(const device::Facts& facts, const PlanKv& kv, int64_t context);

 private:
  KvSizes kv_sizes_;
  std::vector<AlignedBuffer> host_;
  std::vector<std::unique_ptr<device::Buffer>> device_;
};

// Writes bytes of the host into a device's memory, wherever that is; waits until they are there.
class Uploader {
 public:
  explicit Uploader(device::Device& device) : device_(device) {}
  // At a multiple of 4 bytes; up to 3 bytes behind are undefined afterwards.
  void write(const device::View& to, const std::byte* data);
  void clear(const device::Buffer& buffer);

 private:
  device::Stream& stream();
  device::Device& device_;
  std::unique_ptr<device::Stream> stream_;
  std::unique_ptr<device::Buffer> staging_;
};

}  // namespace cfmoe
