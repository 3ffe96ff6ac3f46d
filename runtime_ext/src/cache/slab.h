// Memory of an expert pool, and who reserves it: the host's, or a device's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace cfmoe {

// One piece of memory that holds several slots.
class Slab {
 public:
  virtual ~Slab() = default;
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  virtual std::byte* data() const = 0;  // 16 KiB aligned; null where the host does not reach it
  virtual uint64_t size() const = 0;

 protected:
  Slab() = default;
};

// A device's memory as slabs.
class SlabSource {
 public:
  virtual ~SlabSource() = default;
  virtual uint64_t max_bytes() const = 0;  // of a slab
  virtual std::unique_ptr<Slab> allocate(uint64_t bytes) = 0;
  // Both slabs at rest.
  virtual void copy(const Slab& from, uint64_t from_offset, const Slab& to, uint64_t to_offset, uint64_t bytes) = 0;
  // Has `read` write `bytes` at a 16 KiB aligned address and brings them to their place in the slab, which the device
  // does not use meanwhile. From any thread.
  virtual void fill(const Slab& to, uint64_t offset, uint64_t bytes, const std::function<void(void*)>& read) = 0;
  // Waits until the device uses no slot any more.
  virtual void quiesce() = 0;
};

}  // namespace cfmoe
