// Metal's commands: command buffers on a queue of the stream's own, dispatches that run side by side between barriers.
#include "device/metal/metal_core.h"
#include "error.h"

namespace cfmoe::device {

MetalStream::MetalStream(const MetalCore& core) : core_(core) {
  queue_ = [core.device newCommandQueue];
  if (queue_ == nil) throw Error(ErrorKind::kInternal, "Metal: no queue could be opened (" + core.name + ")");
}

MetalStream::~MetalStream() {
  @autoreleasepool {
    // An encoder must be ended before it goes; what was submitted must end before its buffers go.
    end_encoding();
    for (id<MTLCommandBuffer> commands : submitted_) [commands waitUntilCompleted];
  }
}

id<MTLCommandBuffer> MetalStream::commands() {
  // The caller keeps all buffers until wait() has returned, so Metal need not.
  if (commands_ == nil) commands_ = [queue_ commandBufferWithUnretainedReferences];
  if (commands_ == nil) throw Error(ErrorKind::kInternal, "Metal: no commands can be recorded (" + core_.name + ")");
  return commands_;
}

id<MTLComputeCommandEncoder> MetalStream::compute() {
  if (compute_ == nil) {
    end_encoding();
    compute_ = [commands() computeCommandEncoderWithDispatchType:MTLDispatchTypeConcurrent];
  }
  return compute_;
}

id<MTLBlitCommandEncoder> MetalStream::blit() {
  if (blit_ == nil) {
    end_encoding();
    blit_ = [commands() blitCommandEncoder];
  }
  return blit_;
}

void MetalStream::end_encoding() {
  [compute_ endEncoding];
  [blit_ endEncoding];
  compute_ = nil;
  blit_ = nil;
  bound_ = nil;
}

void MetalStream::dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                           const std::array<uint32_t, 3>& groups) {
  // Vulkan and OpenCL take an empty grid, Metal does not.
  if (groups[0] == 0 || groups[1] == 0 || groups[2] == 0) return;
  @autoreleasepool {
    const auto& kernel = static_cast<const MetalKernel&>(bindings.kernel());
    const KernelCode& code = kernel.code();
    id<MTLComputeCommandEncoder> encoder = compute();
    if (bound_ != kernel.pipeline()) {
      bound_ = kernel.pipeline();
      [encoder setComputePipelineState:bound_];
    }
    NSUInteger index = 0;
    for (const Bindings::Use& use : bindings.uses())
      [encoder setBuffer:object_of(use.view) offset:use.view.offset atIndex:index++];
    if (!scalars.empty()) {
      // One block behind the buffers, every scalar on 8 bytes: TVM's convention for MSL.
      block_.clear();
      for (const int32_t scalar : scalars) block_.emplace_back(scalar, 0);
      [encoder setBytes:block_.data() length:block_.size() * sizeof(block_[0]) atIndex:index];
    }
    [encoder dispatchThreadgroups:MTLSizeMake(groups[0], groups[1], groups[2])
            threadsPerThreadgroup:MTLSizeMake(code.local[0], code.local[1], code.local[2])];
  }
}

void MetalStream::copy(const View& from, const View& to) {
  @autoreleasepool {
    [blit() copyFromBuffer:object_of(from)
              sourceOffset:from.offset
                  toBuffer:object_of(to)
         destinationOffset:to.offset
                      size:from.size];
  }
}

void MetalStream::clear(const View& view) {
  @autoreleasepool {
    [blit() fillBuffer:object_of(view) range:NSMakeRange(view.offset, view.size) value:0];
  }
}

void MetalStream::barrier() {
  // Between encoders, and between the copies of one, Metal keeps the order by itself.
  [compute_ memoryBarrierWithScope:MTLBarrierScopeBuffers];
}

void MetalStream::submit() {
  if (commands_ == nil) return;
  @autoreleasepool {
    end_encoding();
    [commands_ commit];
    last_ = commands_;
    submitted_.push_back(commands_);
    commands_ = nil;
  }
}

void MetalStream::wait() {
  @autoreleasepool {
    // All of them, also behind one that failed: none may be running when the buffers go.
    for (id<MTLCommandBuffer> commands : submitted_) [commands waitUntilCompleted];
    for (id<MTLCommandBuffer> commands : std::exchange(submitted_, {})) check(commands);
  }
}

void MetalStream::check(id<MTLCommandBuffer> commands) const {
  if ([commands status] != MTLCommandBufferStatusError) return;
  NSError* error = [commands error];
  switch ([error code]) {
    case MTLCommandBufferErrorOutOfMemory:
      throw Error("Metal: the memory does not suffice (" + core_.name +
                  "): use a smaller memory budget, or --device cpu");
    case MTLCommandBufferErrorNotPermitted:
      throw Error("Metal: the system lets an app in the background not use the GPU: bring the app to the front, or use "
                  "--device cpu");
    default: throw Error(ErrorKind::kInternal, "Metal: running kernels failed (" + core_.name + "): " + line_of(error));
  }
}

void MetalStream::mark() {
  if (marks_.size() >= kMaxMarks) throw Error(ErrorKind::kInternal, "too many marks");
  // The end of a command buffer is the time that every device keeps.
  submit();
  marks_.push_back(last_);
}

std::vector<double> MetalStream::marks() {
  std::vector<double> seconds;
  for (id<MTLCommandBuffer> commands : std::exchange(marks_, {}))
    seconds.push_back(commands == nil ? 0 : [commands GPUEndTime]);
  return seconds;
}

}  // namespace cfmoe::device
