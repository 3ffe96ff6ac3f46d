// An OpenCL device: choosing and opening it, its memory and its kernels.
#include "device/opencl/opencl_device.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "artifact/checksum.h"
#include "device/kernel_cache.h"
#include "device/opencl/core.h"
#include "error.h"

namespace cfmoe::device {
namespace {

constexpr uint64_t kDataAlignment = 16384;

struct Found {
  cl_device_id handle = nullptr;
  Facts facts;
  std::string identity;  // device and driver, for caches
};

template <typename T>
T device_number(cl_device_id device, cl_device_info what) {
  T value{};
  // Older devices do not know newer questions: they have none of it.
  if (opencl_api().clGetDeviceInfo(device, what, sizeof(value), &value, nullptr) != CL_SUCCESS) return T{};
  return value;
}

std::string device_text(cl_device_id device, cl_device_info what) {
  size_t size = 0;
  opencl_check(opencl_api().clGetDeviceInfo(device, what, 0, nullptr, &size), "asking a device");
  std::string text(size, '\0');
  opencl_check(opencl_api().clGetDeviceInfo(device, what, size, text.data(), nullptr), "asking a device");
  while (!text.empty() && (text.back() == '\0' || text.back() == ' ')) text.pop_back();
  return text;
}

bool has_fine_memory(cl_device_id device) {
  const auto capabilities = device_number<cl_device_svm_capabilities>(device, CL_DEVICE_SVM_CAPABILITIES);
  return (capabilities & CL_DEVICE_SVM_FINE_GRAIN_BUFFER) != 0 && opencl_api().clSVMAlloc != nullptr &&
         opencl_api().clSetKernelArgSVMPointer != nullptr;
}

Found inspect(cl_device_id device) {
  Found found;
  found.handle = device;
  Facts& facts = found.facts;
  facts.kind = Kind::kOpenCl;
  facts.name = device_text(device, CL_DEVICE_NAME);
  facts.driver = device_text(device, CL_DEVICE_VERSION) + ", driver " + device_text(device, CL_DRIVER_VERSION);
  found.identity = facts.name + "\n" + facts.driver;
  const auto type = device_number<cl_device_type>(device, CL_DEVICE_TYPE);
  const bool shares = device_number<cl_bool>(device, CL_DEVICE_HOST_UNIFIED_MEMORY) != 0;
  if ((type & CL_DEVICE_TYPE_CPU) != 0) {
    facts.type = Type::kCpu;
  } else if ((type & CL_DEVICE_TYPE_GPU) != 0) {
    facts.type = shares ? Type::kIntegrated : Type::kDiscrete;
  }
  // Without fine-grained memory OpenCL forbids writing one part of a buffer while a kernel reads another.
  facts.unified = (shares || facts.type == Type::kCpu) && has_fine_memory(device);
  std::istringstream extensions(device_text(device, CL_DEVICE_EXTENSIONS));
  // Every device has these.
  facts.features = {"int16", "int8", "storage16", "storage8"};
  for (std::string extension; extensions >> extension;) {
    if (extension == "cl_khr_fp16") facts.features.emplace_back("float16");
    if (extension == "cl_khr_subgroups") facts.features.emplace_back("subgroup_arithmetic");
    if (extension == "cl_khr_subgroup_shuffle") facts.features.emplace_back("subgroup_shuffle");
    if (extension == "cl_khr_integer_dot_product") facts.features.emplace_back("integer_dot");
  }
  std::sort(facts.features.begin(), facts.features.end());
  facts.memory_bytes = device_number<cl_ulong>(device, CL_DEVICE_GLOBAL_MEM_SIZE);
  facts.max_buffer_bytes = facts.max_binding_bytes = device_number<cl_ulong>(device, CL_DEVICE_MAX_MEM_ALLOC_SIZE);
  facts.offset_alignment = std::max<uint64_t>(device_number<cl_uint>(device, CL_DEVICE_MEM_BASE_ADDR_ALIGN) / 8, 64);
  facts.max_buffers = facts.max_scalars =
      static_cast<uint32_t>(device_number<size_t>(device, CL_DEVICE_MAX_PARAMETER_SIZE) / 16);
  facts.max_group_threads = static_cast<uint32_t>(device_number<size_t>(device, CL_DEVICE_MAX_WORK_GROUP_SIZE));
  size_t sizes[3] = {1, 1, 1};
  opencl_check(opencl_api().clGetDeviceInfo(device, CL_DEVICE_MAX_WORK_ITEM_SIZES, sizeof(sizes), sizes, nullptr),
               "asking a device");
  for (size_t i = 0; i < 3; ++i) {
    facts.max_group[i] = static_cast<uint32_t>(std::min<size_t>(sizes[i], std::numeric_limits<uint32_t>::max()));
    facts.max_groups[i] = std::numeric_limits<int32_t>::max();
  }
  return found;
}

std::vector<Found> find_devices() {
  const OpenClApi& api = opencl_api();
  std::vector<Found> out;
  cl_uint count = 0;
  // A loader without any driver says so by an error of its own.
  if (api.clGetPlatformIDs(0, nullptr, &count) != CL_SUCCESS || count == 0) return out;
  std::vector<cl_platform_id> platforms(count);
  opencl_check(api.clGetPlatformIDs(count, platforms.data(), nullptr), "listing drivers");
  for (cl_platform_id platform : platforms) {
    cl_uint devices = 0;
    if (api.clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 0, nullptr, &devices) != CL_SUCCESS) continue;
    std::vector<cl_device_id> handles(devices);
    opencl_check(api.clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, devices, handles.data(), nullptr), "listing devices");
    for (cl_device_id handle : handles) out.push_back(inspect(handle));
  }
  return out;
}

std::vector<Facts> facts_of(const std::vector<Found>& devices) {
  std::vector<Facts> facts;
  for (const Found& found : devices) facts.push_back(found.facts);
  return facts;
}

class OpenClDevice final : public Device {
 public:
  explicit OpenClDevice(const OpenOptions& options) {
    const std::vector<Found> devices = find_devices();
    const Found& found = devices[choose_device(Kind::kOpenCl, facts_of(devices), options.device)];
    facts_ = found.facts;
    if (options.separate) facts_.unified = false;
    identity_ = found.identity;
    core_.device = found.handle;
    core_.name = facts_.name;
    cl_int result = CL_SUCCESS;
    core_.context = core_.api.clCreateContext(nullptr, 1, &core_.device, nullptr, nullptr, &result);
    core_.check(result, "opening the device");
  }
  ~OpenClDevice() override { core_.api.clReleaseContext(core_.context); }

  uint64_t available_memory() const override { return facts_.memory_bytes; }
  std::unique_ptr<Buffer> allocate(uint64_t size, Memory memory) override {
    using Place = OpenClBuffer::Place;
    const Place place = memory != Memory::kModel ? Place::kHost : facts_.unified ? Place::kShared : Place::kDevice;
    return std::make_unique<OpenClBuffer>(core_, size, place);
  }
  std::vector<std::unique_ptr<Kernel>> load(std::string_view library, std::span<const KernelCode> kernels,
                                            uint64_t key) override;
  std::unique_ptr<Bindings> bind(const Kernel& kernel, std::span<const View> views) override {
    for (const View& view : views) {
      if (view.offset % facts_.offset_alignment != 0 || view.size == 0 ||
          view.offset + view.size > view.buffer->size()) {
        throw Error(ErrorKind::kInternal, "kernel " + kernel.code().name + ": a buffer is not where one can be bound");
      }
    }
    return std::make_unique<OpenClBindings>(core_, static_cast<const OpenClKernel&>(kernel), views);
  }
  std::unique_ptr<Stream> make_stream() override { return std::make_unique<OpenClStream>(core_); }

 private:
  cl_program build(std::string_view source, uint64_t key);
  std::string build_log(cl_program program) const;
  std::string binary_of(cl_program program) const;

  OpenClCore core_;
  std::string identity_;
};

std::string OpenClDevice::build_log(cl_program program) const {
  size_t size = 0;
  core_.api.clGetProgramBuildInfo(program, core_.device, CL_PROGRAM_BUILD_LOG, 0, nullptr, &size);
  std::string log(size, '\0');
  core_.api.clGetProgramBuildInfo(program, core_.device, CL_PROGRAM_BUILD_LOG, size, log.data(), nullptr);
  // The first line that says what is wrong.
  std::istringstream lines(log);
  std::string line, first;
  while (std::getline(lines, line)) {
    if (first.empty()) first = line;
    if (line.find("error") != std::string::npos) return line;
  }
  return first;
}

std::string OpenClDevice::binary_of(cl_program program) const {
  size_t size = 0;
  core_.check(core_.api.clGetProgramInfo(program, CL_PROGRAM_BINARY_SIZES, sizeof(size), &size, nullptr),
              "keeping compiled kernels");
  std::string binary(size, '\0');
  auto* bytes = reinterpret_cast<unsigned char*>(binary.data());
  core_.check(core_.api.clGetProgramInfo(program, CL_PROGRAM_BINARIES, sizeof(bytes), &bytes, nullptr),
              "keeping compiled kernels");
  return binary;
}

cl_program OpenClDevice::build(std::string_view source, uint64_t key) {
  const KernelCache file("opencl", identity_ + format_digest(key));
  const auto release = [this](cl_program p) { core_.api.clReleaseProgram(p); };
  using Owner = std::unique_ptr<_cl_program, decltype(release)>;
  cl_int result = CL_SUCCESS, status = CL_SUCCESS;
  if (const std::string binary = file.load(); !binary.empty()) {
    const size_t size = binary.size();
    const auto* bytes = reinterpret_cast<const unsigned char*>(binary.data());
    Owner program(core_.api.clCreateProgramWithBinary(core_.context, 1, &core_.device, &size, &bytes, &status, &result),
                  release);
    // A driver that was updated in place may refuse what an older one made: then the source is compiled again.
    if (result == CL_SUCCESS && status == CL_SUCCESS &&
        core_.api.clBuildProgram(program.get(), 1, &core_.device, "", nullptr, nullptr) == CL_SUCCESS) {
      return program.release();
    }
    if (result != CL_SUCCESS) program.release();
  }
  const char* text = source.data();
  const size_t size = source.size();
  Owner program(core_.api.clCreateProgramWithSource(core_.context, 1, &text, &size, &result), release);
  if (result != CL_SUCCESS) program.release();
  core_.check(result, "loading kernels");
  result = core_.api.clBuildProgram(program.get(), 1, &core_.device, "", nullptr, nullptr);
  if (result == CL_BUILD_PROGRAM_FAILURE) {
    throw Error("OpenCL: the kernels do not compile (" + facts_.name + "): " + build_log(program.get()) +
                ": compile the artifact for another profile of this device, update the driver, or use --device cpu");
  }
  core_.check(result, "compiling kernels");
  file.store(binary_of(program.get()));
  return program.release();
}

std::vector<std::unique_ptr<Kernel>> OpenClDevice::load(std::string_view library, std::span<const KernelCode> kernels,
                                                        uint64_t key) {
  for (const KernelCode& code : kernels) check_kernel(facts_, code, library.size());
  const cl_program program = build(library, key);
  const auto release = [this](cl_program p) { core_.api.clReleaseProgram(p); };
  const std::unique_ptr<_cl_program, decltype(release)> owner(program, release);
  std::vector<std::unique_ptr<Kernel>> out;
  for (const KernelCode& code : kernels) {
    cl_int result = CL_SUCCESS;
    const cl_kernel handle = core_.api.clCreateKernel(program, code.entry.c_str(), &result);
    if (result == CL_INVALID_KERNEL_NAME)
      throw Error("OpenCL: the library has no kernel " + code.entry + ": compile the artifact again");
    core_.check(result, "loading kernel " + code.name);
    out.push_back(std::make_unique<OpenClKernel>(core_, code, handle));
    cl_uint arguments = 0;
    core_.check(core_.api.clGetKernelInfo(handle, CL_KERNEL_NUM_ARGS, sizeof(arguments), &arguments, nullptr),
                "loading kernel " + code.name);
    if (arguments != code.buffers + code.scalars) {
      throw Error("OpenCL: kernel " + code.name + " takes " + std::to_string(arguments) +
                  " arguments, plan.json says " + std::to_string(code.buffers + code.scalars) +
                  ": compile the artifact again");
    }
  }
  return out;
}

}  // namespace

OpenClBuffer::OpenClBuffer(const OpenClCore& core, uint64_t size, Place place) : core_(core), place_(place) {
  const std::string doing = "reserving " + std::to_string(size) + " bytes";
  size_ = size;
  if (place == Place::kHost) {
    host_ = AlignedBuffer(size);
    data_ = host_.data();
  } else if (place == Place::kShared) {
    shared_ =
        core_.api.clSVMAlloc(core_.context, CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER, size + kDataAlignment, 0);
    if (shared_ == nullptr) core_.check(CL_MEM_OBJECT_ALLOCATION_FAILURE, doing);
    const auto begin = reinterpret_cast<uintptr_t>(shared_);
    data_ = reinterpret_cast<std::byte*>((begin + kDataAlignment - 1) / kDataAlignment * kDataAlignment);
  } else {
    cl_int result = CL_SUCCESS;
    object_ = core_.api.clCreateBuffer(core_.context, CL_MEM_READ_WRITE, size, nullptr, &result);
    core_.check(result, doing);
  }
}

OpenClBuffer::~OpenClBuffer() {
  if (shared_ != nullptr) core_.api.clSVMFree(core_.context, shared_);
  if (object_ != nullptr) core_.api.clReleaseMemObject(object_);
}

std::unique_ptr<Device> open_opencl(const OpenOptions& options) { return std::make_unique<OpenClDevice>(options); }

std::vector<Facts> list_opencl() { return facts_of(find_devices()); }

}  // namespace cfmoe::device
