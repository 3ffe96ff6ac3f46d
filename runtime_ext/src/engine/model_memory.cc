// Lays weights and KV cache out, and fills them.
#include "engine/model_memory.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "store/weights_file.h"

namespace cfmoe {
namespace {

constexpr uint64_t kHostAlignment = 64;
constexpr uint64_t kStagingBytes = uint64_t{4} << 20;

uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

// Kernels of plans are made for 512 bytes; a device may want more.
uint64_t device_alignment(const device::Facts& facts) { return std::max<uint64_t>(512, facts.offset_alignment); }

uint64_t max_block(const device::Facts& facts) {
  return facts.max_buffer_bytes - std::min<uint64_t>(facts.max_buffer_bytes / 2, uint64_t{1} << 20);
}

std::vector<uint64_t> interleaved(const KvSizes& sizes) {
  std::vector<uint64_t> out;
  for (int32_t layer = 0; layer < sizes.layers; ++layer) {
    out.push_back(sizes.k);
    out.push_back(sizes.v);
  }
  return out;
}

}  // namespace

uint64_t BlockLayout::total() const {
  uint64_t sum = 0;
  for (const uint64_t block : blocks) sum += block;
  return sum;
}

BlockLayout lay_out(std::span<const uint64_t> sizes, uint64_t alignment, uint64_t max_block) {
  BlockLayout layout;
  for (const uint64_t size : sizes) {
    const uint64_t rounded = round_up(size, alignment);
    if (rounded > max_block) {
      throw Error("one tensor has " + std::to_string(size) + " bytes, more than the device's largest buffer of " +
                  std::to_string(max_block) + " bytes: use a smaller --context-size or --device cpu");
    }
    if (layout.blocks.empty() || layout.blocks.back() + rounded > max_block) layout.blocks.push_back(0);
    layout.pieces.push_back({layout.blocks.size() - 1, layout.blocks.back(), size});
    layout.blocks.back() += rounded;
  }
  return layout;
}

KvSizes kv_sizes(const PlanKv& plan, int64_t context) {
  const SymbolValues values{1, 0, context};
  return {round_up(tensor_bytes(plan.dtype, plan.k_shape, values), kHostAlignment),
          round_up(tensor_bytes(plan.dtype, plan.v_shape, values), kHostAlignment), plan.layers};
}

void ModelMemory::check_kv(const PlanBuffer& buffer, const SymbolValues& values) const {
  const uint64_t have = buffer.kind == BufferKind::kKCache ? kv_sizes_.k : kv_sizes_.v;
  if (tensor_bytes(buffer.dtype, buffer.shape, values) <= have) return;
  throw Error("plan.json: a buffer of layer " + std::to_string(buffer.layer) +
              " is larger than that layer's KV cache; compile the artifact again");
}

uint64_t ModelMemory::host_weights_bytes(uint64_t file_bytes) { return round_up(file_bytes, kBufferAlignment); }

uint64_t ModelMemory::host_kv_bytes(const PlanKv& kv, int64_t context) {
  const KvSizes sizes = kv_sizes(kv, context);
  return round_up(static_cast<uint64_t>(sizes.layers) * (sizes.k + sizes.v), kBufferAlignment);
}

ModelMemory ModelMemory::on_host(const std::string& path, const ArtifactIndex& index, const PlanKv& kv, int64_t context,
                                 IoMode io) {
  ModelMemory memory;
  LoadedWeights loaded = load_weights(path, index.weights, io);
  memory.warning = loaded.warning;
  for (const TensorEntry& tensor : index.weights) memory.weights.push_back({loaded.block.data() + tensor.offset, {}});
  memory.kv_sizes_ = kv_sizes(kv, context);
  AlignedBuffer cache(host_kv_bytes(kv, context));
  std::byte* place = cache.data();
  for (int32_t layer = 0; layer < kv.layers; ++layer) {
    memory.k.push_back({place, {}});
    memory.v.push_back({place + memory.kv_sizes_.k, {}});
    place += memory.kv_sizes_.k + memory.kv_sizes_.v;
  }
  memory.host_.push_back(std::move(loaded.block));
  memory.host_.push_back(std::move(cache));
  return memory;
}

BlockLayout ModelMemory::device_weights(const device::Facts& facts, const ArtifactIndex& index) {
  std::vector<uint64_t> sizes;
  for (const TensorEntry& tensor : index.weights) sizes.push_back(tensor.size);
  return lay_out(sizes, device_alignment(facts), max_block(facts));
}

BlockLayout ModelMemory::device_kv(const device::Facts& facts, const PlanKv& kv, int64_t context) {
  return lay_out(interleaved(kv_sizes(kv, context)), device_alignment(facts), max_block(facts));
}

ModelMemory ModelMemory::on_device(device::Device& device, const std::string& path, const ArtifactIndex& index,
                                   const PlanKv& kv, int64_t context, IoMode io) {
  ModelMemory memory;
  const auto reserve = [&](const BlockLayout& layout) {
    std::vector<TensorPlace> places;
    const size_t first = memory.device_.size();
    for (const uint64_t size : layout.blocks) memory.device_.push_back(device.allocate(size, device::Memory::kModel));
    for (const BlockLayout::Piece& piece : layout.pieces) {
      const device::View view{memory.device_[first + piece.block].get(), piece.offset, piece.size};
      places.push_back({view.data(), view});
    }
    return places;
  };
  Uploader uploader(device);
  memory.weights = reserve(device_weights(device.facts(), index));
  memory.warning =
      stream_weights(path, index.weights, io, [&](size_t tensor, uint64_t offset, std::span<const std::byte> bytes) {
        const device::View& view = memory.weights[tensor].view;
        uploader.write({view.buffer, view.offset + offset, bytes.size()}, bytes.data());
      });
  memory.kv_sizes_ = kv_sizes(kv, context);
  const size_t first = memory.device_.size();
  const std::vector<TensorPlace> pairs = reserve(device_kv(device.facts(), kv, context));
  for (size_t i = first; i < memory.device_.size(); ++i) uploader.clear(*memory.device_[i]);
  for (size_t i = 0; i < pairs.size(); ++i) (i % 2 == 0 ? memory.k : memory.v).push_back(pairs[i]);
  return memory;
}

device::Stream& Uploader::stream() {
  if (!stream_) stream_ = device_.make_stream();
  return *stream_;
}

void Uploader::write(const device::View& to, const std::byte* data) {
  if (to.data() != nullptr) {
    std::memcpy(to.data(), data, to.size);
    return;
  }
  if (!staging_) staging_ = device_.allocate(kStagingBytes, device::Memory::kHost);
  for (uint64_t done = 0; done < to.size; done += kStagingBytes) {
    const uint64_t part = std::min(kStagingBytes, to.size - done);
    std::memcpy(staging_->data(), data + done, part);
    // Whole words; buffers are padded.
    const uint64_t words = round_up(part, 4);
    stream().copy({staging_.get(), 0, words}, {to.buffer, to.offset + done, words});
    stream().submit();
    stream().wait();
  }
}

void Uploader::clear(const device::Buffer& buffer) {
  if (buffer.data() != nullptr) {
    std::memset(buffer.data(), 0, buffer.size());
    return;
  }
  stream().clear({&buffer, 0, buffer.size()});
  stream().submit();
  stream().wait();
}

}  // namespace cfmoe
