// What the parts of one opened OpenCL device share.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "device/opencl/api.h"
#include "store/aligned_buffer.h"

namespace cfmoe::device {

struct OpenClCore {
  const OpenClApi& api = opencl_api();
  cl_device_id device = nullptr;
  cl_context context = nullptr;
  std::string name;

  void check(cl_int result, const std::string& doing) const { opencl_check(result, doing + " (" + name + ")"); }
};

// Host memory; shared virtual memory, where host and device may write different parts of a buffer at the same time; or
// a memory object that only the device reaches.
class OpenClBuffer final : public Buffer {
 public:
  enum class Place : uint8_t { kHost, kShared, kDevice };
  OpenClBuffer(const OpenClCore& core, uint64_t size, Place place);
  ~OpenClBuffer() override;
  Place place() const { return place_; }
  cl_mem object() const { return object_; }  // kDevice

 private:
  const OpenClCore& core_;
  Place place_;
  AlignedBuffer host_;
  void* shared_ = nullptr;
  cl_mem object_ = nullptr;
};

inline const OpenClBuffer& buffer_of(const View& view) { return static_cast<const OpenClBuffer&>(*view.buffer); }

class OpenClKernel final : public Kernel {
 public:
  OpenClKernel(const OpenClCore& core, KernelCode code, cl_kernel handle)
      : Kernel(std::move(code)), core_(core), handle_(handle) {}
  ~OpenClKernel() override { core_.api.clReleaseKernel(handle_); }
  cl_kernel handle() const { return handle_; }

 private:
  const OpenClCore& core_;
  cl_kernel handle_;
};

class OpenClBindings final : public Bindings {
 public:
  OpenClBindings(const OpenClCore& core, const OpenClKernel& kernel, std::span<const View> views);
  ~OpenClBindings() override;
  // Gives the kernel its buffers.
  void apply() const;

 private:
  void release();

  const OpenClCore& core_;
  std::vector<cl_mem> parts_;  // per buffer; null for shared memory
};

class OpenClStream final : public Stream {
 public:
  explicit OpenClStream(const OpenClCore& core);
  ~OpenClStream() override;

  void dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                const std::array<uint32_t, 3>& groups) override;
  void copy(const View& from, const View& to) override;
  void clear(const View& view) override;
  void barrier() override {}  // the queue keeps the order
  void submit() override;
  void wait() override;
  void mark() override;
  std::vector<double> marks() override;

 private:
  const OpenClCore& core_;
  cl_command_queue queue_ = nullptr;
  std::vector<cl_event> marks_;
};

}  // namespace cfmoe::device
