// Loads the always-resident tensors of weights.bin into one block of memory and verifies each.
#include "store/weights_file.h"

#include <fcntl.h>

#include "artifact/checksum.h"
#include "error.h"
#include "store/file_handle.h"

namespace cfmoe {

LoadedWeights load_weights(const std::string& path, const std::vector<TensorEntry>& weights, IoMode mode) {
  LoadedWeights loaded;
  FileHandle file = open_data_file(path, mode, &loaded.warning);
  uint64_t size = file.size();
  loaded.block = AlignedBuffer(size);
  // The block is a multiple of 16 KiB, so the length may be rounded up for a direct read of a file that is not.
  uint64_t wanted = file.direct() ? (size + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment : size;
  uint64_t got = file.read_at(0, loaded.block.data(), wanted);
  if (got < size) {
    throw Error(path + ": the file ends after " + std::to_string(got) + " of " + std::to_string(size) +
                " bytes; copy the artifact again or compile it again with cfmoe compile");
  }
#if defined(POSIX_FADV_DONTNEED)
  // The tensors are in memory now; a second copy in the page cache would only push experts out of it. Advice only:
  // failure is harmless.
  if (!file.direct()) ::posix_fadvise(file.descriptor(), 0, 0, POSIX_FADV_DONTNEED);
#endif
  for (const TensorEntry& tensor : weights) {
    if (tensor.offset > size || tensor.size > size - tensor.offset) {
      throw Error(path + ": tensor " + tensor.name +
                  " lies outside the file; compile the artifact again with cfmoe compile");
    }
    uint64_t digest = xxh3_64(loaded.block.data() + tensor.offset, tensor.size);
    if (digest != tensor.xxh3_64) {
      throw Error(path + ": tensor " + tensor.name + " is damaged: its digest is " + format_digest(digest) +
                  ", the index says " + format_digest(tensor.xxh3_64) +
                  "; copy the artifact again or compile it again with cfmoe compile");
    }
  }
  return loaded;
}

}  // namespace cfmoe
