// What the parts of one opened Metal device share. Objective-C++ with automatic reference counting, compiled by Xcode
// in the iOS app.
#pragma once

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "store/aligned_buffer.h"

namespace cfmoe::device {

// The line of an NSError, on one line.
std::string line_of(NSError* error);

struct MetalCore {
  id<MTLDevice> device = nil;
  std::string name;
};

// Memory that host and device share, or that only the device reaches.
class MetalBuffer final : public Buffer {
 public:
  // `shared`: mapped. Throws cfmoe::Error where the device has no room.
  MetalBuffer(const MetalCore& core, uint64_t size, bool shared);
  ~MetalBuffer() override;
  id<MTLBuffer> object() const { return object_; }

 private:
  // Metal puts small buffers anywhere; direct I/O wants whole pages, so the memory is ours and Metal wraps it.
  AlignedBuffer memory_;
  id<MTLBuffer> object_ = nil;
};

inline id<MTLBuffer> object_of(const View& view) { return static_cast<const MetalBuffer&>(*view.buffer).object(); }

class MetalKernel final : public Kernel {
 public:
  MetalKernel(KernelCode code, id<MTLComputePipelineState> pipeline) : Kernel(std::move(code)), pipeline_(pipeline) {}
  id<MTLComputePipelineState> pipeline() const { return pipeline_; }

 private:
  id<MTLComputePipelineState> pipeline_;
};

class MetalStream final : public Stream {
 public:
  explicit MetalStream(const MetalCore& core);
  ~MetalStream() override;

  void dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                const std::array<uint32_t, 3>& groups) override;
  void copy(const View& from, const View& to) override;
  void clear(const View& view) override;
  void barrier() override;
  void submit() override;
  void wait() override;
  void mark() override;
  std::vector<double> marks() override;

 private:
  id<MTLCommandBuffer> commands();
  id<MTLComputeCommandEncoder> compute();
  id<MTLBlitCommandEncoder> blit();
  void end_encoding();
  void check(id<MTLCommandBuffer> commands) const;

  const MetalCore& core_;
  id<MTLCommandQueue> queue_ = nil;
  id<MTLCommandBuffer> commands_ = nil;         // being recorded
  id<MTLComputeCommandEncoder> compute_ = nil;  // at most one of these two
  id<MTLBlitCommandEncoder> blit_ = nil;
  id<MTLComputePipelineState> bound_ = nil;
  id<MTLCommandBuffer> last_ = nil;                 // submitted last
  std::vector<id<MTLCommandBuffer>> submitted_;     // since the last wait
  std::vector<id<MTLCommandBuffer>> marks_;         // whose ends are the marks; nil: nothing had run
  std::vector<std::pair<int32_t, int32_t>> block_;  // scalars as the kernels read them
};

}  // namespace cfmoe::device
