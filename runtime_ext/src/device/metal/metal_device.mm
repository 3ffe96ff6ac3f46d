// A Metal device: choosing and opening it, its memory and its kernels. Registers itself when the program starts.
#include <TargetConditionals.h>

#include <algorithm>
#include <limits>

#include "device/metal/metal_core.h"
#include "error.h"
#if TARGET_OS_IPHONE
#include <os/proc.h>
#endif

namespace cfmoe::device {
namespace {

// Metal's limits, from its feature set tables: 31 buffers a kernel, of which the scalars take one; 4 KiB in place of a
// buffer.
constexpr uint32_t kMaxBuffers = 30, kMaxScalars = 4096 / 8;
// Enough for every GPU family.
constexpr uint64_t kOffsetAlignment = 256;

std::string text_of(NSString* text) { return text == nil ? std::string() : std::string([text UTF8String]); }

NSArray<id<MTLDevice>>* all_devices() {
#if TARGET_OS_OSX
  return MTLCopyAllDevices();
#else
  id<MTLDevice> device = MTLCreateSystemDefaultDevice();
  return device == nil ? @[] : @[ device ];
#endif
}

uint64_t working_set(id<MTLDevice> device) {
  if (@available(iOS 16.0, macOS 10.12, *)) return [device recommendedMaxWorkingSetSize];
  return [[NSProcessInfo processInfo] physicalMemory];
}

Facts facts_of(id<MTLDevice> device) {
  Facts facts;
  facts.kind = Kind::kMetal;
  facts.name = text_of([device name]);
  facts.driver = "Metal, " + text_of([[NSProcessInfo processInfo] operatingSystemVersionString]);
  facts.unified = [device hasUnifiedMemory];
  facts.type = facts.unified ? Type::kIntegrated : Type::kDiscrete;
  // Every GPU that Metal runs on has these.
  facts.features = {"float16", "int16", "int8", "storage16", "storage8", "subgroup_arithmetic", "subgroup_shuffle"};
  facts.memory_bytes = working_set(device);
  facts.max_buffer_bytes = facts.max_binding_bytes = [device maxBufferLength];
  facts.offset_alignment = kOffsetAlignment;
  facts.max_buffers = kMaxBuffers;
  facts.max_scalars = kMaxScalars;
  const MTLSize group = [device maxThreadsPerThreadgroup];
  facts.max_group = {static_cast<uint32_t>(group.width), static_cast<uint32_t>(group.height),
                     static_cast<uint32_t>(group.depth)};
  facts.max_group_threads = *std::max_element(facts.max_group.begin(), facts.max_group.end());
  facts.max_groups.fill(std::numeric_limits<int32_t>::max());
  return facts;
}

class MetalDevice final : public Device {
 public:
  explicit MetalDevice(const OpenOptions& options) {
    @autoreleasepool {
      NSArray<id<MTLDevice>>* devices = all_devices();
      std::vector<Facts> facts;
      for (id<MTLDevice> device in devices) facts.push_back(facts_of(device));
      const size_t index = choose_device(Kind::kMetal, facts, options.device);
      core_.device = devices[index];
      facts_ = facts[index];
      if (options.separate) facts_.unified = false;
      core_.name = facts_.name;
    }
  }

  uint64_t available_memory() const override {
    const uint64_t used = [core_.device currentAllocatedSize];
    const uint64_t left = facts_.memory_bytes > used ? facts_.memory_bytes - used : 0;
#if TARGET_OS_IPHONE
    // What the system leaves to the app counts all of its memory. 0 where it sets no limit, in the simulator.
    if (const uint64_t app = os_proc_available_memory(); app > 0) return std::min(left, app);
#endif
    return left;
  }

  std::unique_ptr<Buffer> allocate(uint64_t size, Memory memory) override {
    return std::make_unique<MetalBuffer>(core_, size, memory != Memory::kModel || facts_.unified);
  }

  std::vector<std::unique_ptr<Kernel>> load(std::string_view library, std::span<const KernelCode> kernels,
                                            uint64_t key) override;

  std::unique_ptr<Bindings> bind(const Kernel& kernel, std::span<const View> views) override {
    for (const View& view : views) {
      if (view.offset % kOffsetAlignment != 0 || view.size == 0 || view.offset + view.size > view.buffer->size())
        throw Error(ErrorKind::kInternal, "kernel " + kernel.code().name + ": a buffer is not where one can be bound");
    }
    return std::make_unique<Bindings>(kernel, views);
  }

  std::unique_ptr<Stream> make_stream() override { return std::make_unique<MetalStream>(core_); }

 private:
  std::unique_ptr<Kernel> load_kernel(id<MTLLibrary> library, const KernelCode& code) const;

  MetalCore core_;
};

// The system keeps what it has compiled for this app, so there is no cache of our own.
std::vector<std::unique_ptr<Kernel>> MetalDevice::load(std::string_view library, std::span<const KernelCode> kernels,
                                                       uint64_t /*key*/) {
  @autoreleasepool {
    for (const KernelCode& code : kernels) check_kernel(facts_, code, library.size());
    NSString* source = [[NSString alloc] initWithBytes:library.data()
                                                length:library.size()
                                              encoding:NSUTF8StringEncoding];
    if (source == nil) throw Error("Metal: the kernels are no text: compile the artifact again");
    MTLCompileOptions* options = [[MTLCompileOptions alloc] init];
    options.languageVersion = MTLLanguageVersion2_4;
    // Fused and reordered arithmetic would make results depend on the compiler's version.
    options.fastMathEnabled = NO;
    NSError* error = nil;
    id<MTLLibrary> compiled = [core_.device newLibraryWithSource:source options:options error:&error];
    // Warnings come as an error beside a library.
    if (compiled == nil) {
      throw Error("Metal: the kernels do not compile (" + facts_.name + "): " + line_of(error) +
                  ": compile the artifact for another profile of this device, or use --device cpu");
    }
    std::vector<std::unique_ptr<Kernel>> out;
    for (const KernelCode& code : kernels) out.push_back(load_kernel(compiled, code));
    return out;
  }
}

std::unique_ptr<Kernel> MetalDevice::load_kernel(id<MTLLibrary> library, const KernelCode& code) const {
  id<MTLFunction> function = [library newFunctionWithName:@(code.entry.c_str())];
  if (function == nil) throw Error("Metal: the library has no kernel " + code.entry + ": compile the artifact again");
  const uint64_t threads = uint64_t{code.local[0]} * code.local[1] * code.local[2];
  MTLComputePipelineDescriptor* descriptor = [[MTLComputePipelineDescriptor alloc] init];
  descriptor.computeFunction = function;
  // Else the compiler may use so many registers that the workgroup does not fit.
  descriptor.maxTotalThreadsPerThreadgroup = threads;
  NSError* error = nil;
  id<MTLComputePipelineState> pipeline = [core_.device newComputePipelineStateWithDescriptor:descriptor
                                                                                     options:MTLPipelineOptionNone
                                                                                  reflection:nil
                                                                                       error:&error];
  if (pipeline == nil) {
    throw Error("Metal: kernel " + code.name + " does not work (" + facts_.name + "): " + line_of(error) +
                ": compile the artifact for another profile of this device, or use --device cpu");
  }
  if ([pipeline maxTotalThreadsPerThreadgroup] < threads) {
    throw Error("Metal: kernel " + code.name + " has workgroups of " + std::to_string(threads) + " threads, " +
                facts_.name + " runs " + std::to_string([pipeline maxTotalThreadsPerThreadgroup]) +
                ": compile the artifact for another profile of this device, or use --device cpu");
  }
  return std::make_unique<MetalKernel>(code, pipeline);
}

std::unique_ptr<Device> open_metal(const OpenOptions& options) { return std::make_unique<MetalDevice>(options); }

std::vector<Facts> list_metal() {
  @autoreleasepool {
    std::vector<Facts> out;
    for (id<MTLDevice> device in all_devices()) out.push_back(facts_of(device));
    return out;
  }
}

const bool registered = [] {
  register_backend(Kind::kMetal, {open_metal, list_metal});
  return true;
}();

}  // namespace

std::string line_of(NSError* error) {
  std::string line = error == nil ? "no reason was given" : text_of([error localizedDescription]);
  std::replace(line.begin(), line.end(), '\n', ' ');
  return line;
}

MetalBuffer::MetalBuffer(const MetalCore& core, uint64_t size, bool shared) {
  size_ = size;
  @autoreleasepool {
    // The engine places barriers; within a command encoder Metal would order nothing anyway.
    if (shared) {
      memory_ = AlignedBuffer(size);
      object_ = [core.device newBufferWithBytesNoCopy:memory_.data()
                                               length:memory_.size()
                                              options:MTLResourceStorageModeShared
                                          deallocator:nil];
      data_ = memory_.data();
    } else {
      object_ = [core.device newBufferWithLength:size options:MTLResourceStorageModePrivate];
    }
  }
  if (object_ == nil) {
    throw Error("Metal: there is no room for " + std::to_string(size) + " bytes (" + core.name +
                "): use a smaller memory budget, or --device cpu");
  }
}

// The wrapping goes before the memory does.
MetalBuffer::~MetalBuffer() { object_ = nil; }

}  // namespace cfmoe::device
