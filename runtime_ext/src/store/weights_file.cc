// Loads the always-resident tensors of weights.bin into one block of memory and verifies each.
#include "store/weights_file.h"

#include <fcntl.h>

#include <algorithm>

#include "artifact/checksum.h"
#include "error.h"
#include "store/file_handle.h"

namespace cfmoe {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{4} << 20;

[[noreturn]] void fail_short(const std::string& path, uint64_t got, uint64_t size) {
  throw Error(path + ": the file ends after " + std::to_string(got) + " of " + std::to_string(size) +
              " bytes; copy the artifact again or compile it again with cfmoe compile");
}

void check_inside(const std::string& path, const TensorEntry& tensor, uint64_t size) {
  if (tensor.offset <= size && tensor.size <= size - tensor.offset) return;
  throw Error(path + ": tensor " + tensor.name +
              " lies outside the file; compile the artifact again with cfmoe compile");
}

void check_digest(const std::string& path, const TensorEntry& tensor, uint64_t digest) {
  if (digest == tensor.xxh3_64) return;
  throw Error(path + ": tensor " + tensor.name + " is damaged: its digest is " + format_digest(digest) +
              ", the index says " + format_digest(tensor.xxh3_64) +
              "; copy the artifact again or compile it again with cfmoe compile");
}

// The tensors are in memory now; a second copy in the page cache would only push experts out of it. Advice only:
// failure is harmless.
void drop_cached(const FileHandle& file) {
#if defined(POSIX_FADV_DONTNEED)
  if (!file.direct()) ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
#else
  (void)file;
#endif
}

}  // namespace

LoadedWeights load_weights(const std::string& path, const std::vector<TensorEntry>& weights, IoMode mode) {
  LoadedWeights loaded;
  FileHandle file = open_data_file(path, mode, &loaded.warning);
  uint64_t size = file.size();
  loaded.block = AlignedBuffer(size, Pages::kHuge);
  // The block is a multiple of 16 KiB, so the length may be rounded up for a direct read of a file that is not.
  uint64_t wanted = file.direct() ? (size + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment : size;
  uint64_t got = file.read_at(0, loaded.block.data(), wanted);
  if (got < size) fail_short(path, got, size);
  drop_cached(file);
  for (const TensorEntry& tensor : weights) {
    check_inside(path, tensor, size);
    check_digest(path, tensor, xxh3_64(loaded.block.data() + tensor.offset, tensor.size));
  }
  return loaded;
}

std::string stream_weights(const std::string& path, const std::vector<TensorEntry>& weights, IoMode mode,
                           const TakeTensorBytes& take) {
  std::string warning;
  FileHandle file = open_data_file(path, mode, &warning);
  const uint64_t size = file.size();
  AlignedBuffer piece(kPieceBytes);
  for (size_t i = 0; i < weights.size(); ++i) {
    const TensorEntry& tensor = weights[i];
    check_inside(path, tensor, size);
    DigestStream digest;
    for (uint64_t done = 0; done < tensor.size;) {
      // Direct reads want aligned offsets: the piece may begin before the tensor's next byte.
      const uint64_t from = (tensor.offset + done) / kDirectAlignment * kDirectAlignment;
      const uint64_t skip = tensor.offset + done - from;
      const uint64_t part = std::min(tensor.size - done, kPieceBytes - skip);
      const uint64_t wanted = (skip + part + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
      const uint64_t got = file.read_at(from, piece.data(), wanted);
      if (got < skip + part) fail_short(path, from + got, size);
      digest.add(piece.data() + skip, part);
      take(i, done, {piece.data() + skip, part});
      done += part;
    }
    check_digest(path, tensor, digest.value());
  }
  drop_cached(file);
  return warning;
}

}  // namespace cfmoe
