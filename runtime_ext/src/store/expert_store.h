// Reads expert records from experts.bin and verifies them on first read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "artifact/index.h"
#include "cache/expert_key.h"

namespace cfmoe {

enum class IoMode : uint8_t { kAuto, kDirect, kBuffered, kMmap };

// Parses "auto", "direct", "buffered" or "mmap"; throws cfmoe::Error otherwise.
IoMode parse_io_mode(const std::string& name);
const char* io_mode_name(IoMode mode);

class ExpertStore {
 public:
  virtual ~ExpertStore() = default;
  // Never kAuto: what `auto` became.
  virtual IoMode mode() const = 0;
  virtual const ExpertIndex& index() const = 0;
  // Reads the record into `destination` (16 KiB aligned, record_stride bytes) and returns the bytes that the system
  // read. Safe to call from several threads. Throws cfmoe::Error naming the file, layer and expert on a short read, an
  // I/O error or a digest that differs.
  virtual uint64_t read(ExpertKey key, void* destination) = 0;
  // mmap only: the record's address in the mapping, after faulting it in and verifying it; null otherwise.
  virtual void* map(ExpertKey key) = 0;
  // mmap only: lets the system drop the record's pages.
  virtual void unmap(ExpertKey key) = 0;
  // Warnings to show once (for instance: direct I/O refused by the file system), empty if none.
  virtual std::string warning() const = 0;
};

std::unique_ptr<ExpertStore> open_expert_store(const std::string& path, const ExpertIndex& index, IoMode mode);

}  // namespace cfmoe
