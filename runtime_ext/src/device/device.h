// A GPU as the engine sees it: buffers, kernels, and streams that record and run them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cfmoe::device {

enum class Kind : uint8_t { kVulkan, kOpenCl, kMetal };
const char* kind_name(Kind kind);  // as manifests and --device write it

enum class Type : uint8_t { kDiscrete, kIntegrated, kCpu, kOther };
const char* type_name(Type type);

struct Facts {
  Kind kind = Kind::kVulkan;
  Type type = Type::kOther;
  std::string name, driver;           // driver with its version
  std::vector<std::string> features;  // in the names of manifests, sorted
  bool unified = false;               // the host reaches all memory at full speed: Memory::kModel is mapped
  bool binds_host = false;            // kernels may read and write Memory::kHost and kUpload where they lie
  uint64_t memory_bytes = 0;          // of the device; 0: unknown
  uint64_t max_buffer_bytes = 0;      // of one buffer
  uint64_t max_binding_bytes = 0;     // of what a kernel binds
  uint64_t offset_alignment = 1;      // of what a kernel binds, a power of two
  uint32_t max_buffers = 0;           // that a kernel binds
  uint32_t max_scalars = 0;           // int32 arguments of a kernel
  uint32_t max_group_threads = 0;     // of a workgroup
  std::array<uint32_t, 3> max_group{}, max_groups{};
};

enum class Memory : uint8_t {
  kModel,   // what kernels read and write at full speed; mapped where memory is unified
  kHost,    // mapped and cached by the host, for what travels between host and device
  kUpload,  // what the host writes and kernels read: mapped, and in the device's own memory if possible; slow to read
            // back
};

// Its contents are undefined until they are written.
class Buffer {
 public:
  virtual ~Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint64_t size() const { return size_; }
  // Aligned to 16 KiB, or null where the host does not reach the buffer.
  std::byte* data() const { return data_; }

 protected:
  Buffer() = default;
  uint64_t size_ = 0;
  std::byte* data_ = nullptr;
};

// Part of a buffer.
struct View {
  const Buffer* buffer = nullptr;
  uint64_t offset = 0, size = 0;

  std::byte* data() const { return buffer->data() == nullptr ? nullptr : buffer->data() + offset; }
};

// One kernel of a library, as plan.json describes it.
struct KernelCode {
  std::string name;   // in messages
  std::string entry;  // of the code
  uint64_t offset = 0, bytes = 0;
  std::array<uint32_t, 3> local{1, 1, 1};
  uint32_t buffers = 0, scalars = 0;
  std::vector<uint32_t> writes;  // the buffer parameters that the kernel writes
};

class Kernel {
 public:
  explicit Kernel(KernelCode code) : code_(std::move(code)) {}
  virtual ~Kernel() = default;
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;
  const KernelCode& code() const { return code_; }

 private:
  KernelCode code_;
};

// A kernel with the buffers that it works on, which must outlive it.
class Bindings {
 public:
  struct Use {
    View view;
    bool write = false;
  };
  Bindings(const Kernel& kernel, std::span<const View> views);
  virtual ~Bindings() = default;
  Bindings(const Bindings&) = delete;
  Bindings& operator=(const Bindings&) = delete;
  const Kernel& kernel() const { return kernel_; }
  std::span<const Use> uses() const { return uses_; }

 private:
  const Kernel& kernel_;
  std::vector<Use> uses_;
};

// Commands in order. One thread at a time; what is bound or copied must live until wait() has returned.
class Stream {
 public:
  virtual ~Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Nothing orders two dispatches or copies but a barrier between them.
  virtual void dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                        const std::array<uint32_t, 3>& groups) = 0;
  // The same number of bytes, a multiple of 4 at multiples of 4.
  virtual void copy(const View& from, const View& to) = 0;
  // Zeros, a multiple of 4 bytes at a multiple of 4.
  virtual void clear(const View& view) = 0;
  virtual void barrier() = 0;
  // Starts what was recorded; nothing recorded, nothing done.
  virtual void submit() = 0;
  // Until all that was submitted has ended; what it wrote into mapped memory is then there to be read.
  virtual void wait() = 0;

  // Whether commands can be recorded before others that run first: what comes between defer(true) and defer(false) is
  // kept until submit_deferred() starts it behind all that was recorded otherwise. One set at a time.
  virtual bool can_defer() const { return false; }
  virtual void defer(bool /*on*/) {}
  virtual void submit_deferred() { submit(); }

  // Notes the device's time when all that was recorded before has ended; at most kMaxMarks between two calls of
  // marks().
  virtual void mark() = 0;
  // Seconds of the marks since the last call, after wait().
  virtual std::vector<double> marks() = 0;
  static constexpr uint32_t kMaxMarks = 1024;

 protected:
  Stream() = default;
};

// Errors of all calls: cfmoe::Error, out of memory and a lost device in words that name the remedy.
class Device {
 public:
  virtual ~Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Facts& facts() const { return facts_; }
  // Bytes that the device can still give, as far as the driver tells: else its memory's size.
  virtual uint64_t available_memory() const = 0;
  // From any thread.
  virtual std::unique_ptr<Buffer> allocate(uint64_t size, Memory memory) = 0;
  // Compiles the kernels of a library; every code range lies inside it. `key` names the set in the cache on disk.
  virtual std::vector<std::unique_ptr<Kernel>> load(std::string_view library, std::span<const KernelCode> kernels,
                                                    uint64_t key) = 0;
  virtual std::unique_ptr<Bindings> bind(const Kernel& kernel, std::span<const View> views) = 0;
  // Streams do not wait for one another.
  virtual std::unique_ptr<Stream> make_stream() = 0;

 protected:
  Device() = default;
  Facts facts_;
};

// What `kernel` needs and the device lacks, as an Error; called by load().
void check_kernel(const Facts& facts, const KernelCode& kernel, uint64_t library_bytes);

struct OpenOptions {
  std::string device;  // index or part of the name; "": the environment's CFMOE_VULKAN_DEVICE or CFMOE_OPENCL_DEVICE,
                       // else the best
  bool separate = false;  // treat the device's memory as out of the host's reach
  bool validate = false;  // Vulkan: load the Khronos validation layer
};
// Options out of the environment: CFMOE_VULKAN_DEVICE, CFMOE_OPENCL_DEVICE, CFMOE_METAL_DEVICE,
// CFMOE_DEVICE_MEMORY=separate, CFMOE_VULKAN_VALIDATE=1.
OpenOptions options_from_environment(Kind kind);

// How devices of a kind are opened and listed. Metal's is written in Objective-C++, built by Xcode outside of this
// library, and registers itself.
struct Backend {
  std::unique_ptr<Device> (*open)(const OpenOptions& options) = nullptr;
  std::vector<Facts> (*list)() = nullptr;
};
void register_backend(Kind kind, const Backend& backend);

// Throws cfmoe::Error where there is no driver or no such device.
std::unique_ptr<Device> open_device(Kind kind, const OpenOptions& options);
// All devices of a kind, in the order of their indices. Throws cfmoe::Error where there is no driver.
std::vector<Facts> list_devices(Kind kind);
// Which of `devices` the options name, or the best: discrete before integrated before CPU. Throws cfmoe::Error.
size_t choose_device(Kind kind, std::span<const Facts> devices, const std::string& wanted);

}  // namespace cfmoe::device
