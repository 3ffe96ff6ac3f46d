// OpenCL's commands: an in-order queue.
#include <cstring>

#include "device/opencl/core.h"
#include "error.h"

namespace cfmoe::device {
namespace {

using Place = OpenClBuffer::Place;

}  // namespace

OpenClBindings::OpenClBindings(const OpenClCore& core, const OpenClKernel& kernel, std::span<const View> views)
    : Bindings(kernel, views), core_(core) {
  try {
    for (const View& view : views) {
      const OpenClBuffer& buffer = buffer_of(view);
      if (buffer.place() == Place::kHost)
        throw Error(ErrorKind::kInternal, "kernel " + kernel.code().name + ": host memory cannot be bound");
      parts_.push_back(nullptr);
      if (buffer.place() == Place::kShared) continue;
      const cl_buffer_region region{view.offset, view.size};
      cl_int result = CL_SUCCESS;
      parts_.back() = core_.api.clCreateSubBuffer(buffer.object(), CL_MEM_READ_WRITE, CL_BUFFER_CREATE_TYPE_REGION,
                                                  &region, &result);
      core_.check(result, "binding kernel " + kernel.code().name);
    }
  } catch (...) {
    release();
    throw;
  }
}

OpenClBindings::~OpenClBindings() { release(); }

void OpenClBindings::release() {
  for (cl_mem part : parts_) {
    if (part != nullptr) core_.api.clReleaseMemObject(part);
  }
}

void OpenClBindings::apply() const {
  const cl_kernel handle = static_cast<const OpenClKernel&>(kernel()).handle();
  for (cl_uint i = 0; i < parts_.size(); ++i) {
    const cl_int result = parts_[i] != nullptr ? core_.api.clSetKernelArg(handle, i, sizeof(cl_mem), &parts_[i])
                                               : core_.api.clSetKernelArgSVMPointer(handle, i, uses()[i].view.data());
    core_.check(result, "giving kernel " + kernel().code().name + " its buffers");
  }
}

OpenClStream::OpenClStream(const OpenClCore& core) : core_(core) {
  cl_int result = CL_SUCCESS;
  queue_ = core_.api.clCreateCommandQueue(core_.context, core_.device, CL_QUEUE_PROFILING_ENABLE, &result);
  core_.check(result, "opening a queue");
}

OpenClStream::~OpenClStream() {
  core_.api.clFinish(queue_);
  for (cl_event event : marks_) core_.api.clReleaseEvent(event);
  core_.api.clReleaseCommandQueue(queue_);
}

void OpenClStream::dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                            const std::array<uint32_t, 3>& groups) {
  const auto& kernel = static_cast<const OpenClKernel&>(bindings.kernel());
  const KernelCode& code = kernel.code();
  static_cast<const OpenClBindings&>(bindings).apply();
  for (size_t i = 0; i < scalars.size(); ++i) {
    core_.check(
        core_.api.clSetKernelArg(kernel.handle(), static_cast<cl_uint>(code.buffers + i), sizeof(int32_t), &scalars[i]),
        "giving kernel " + code.name + " its scalars");
  }
  size_t global[3], local[3];
  for (size_t i = 0; i < 3; ++i) {
    local[i] = code.local[i];
    global[i] = local[i] * groups[i];
  }
  core_.check(core_.api.clEnqueueNDRangeKernel(queue_, kernel.handle(), 3, nullptr, global, local, 0, nullptr, nullptr),
              "starting kernel " + code.name);
}

void OpenClStream::copy(const View& from, const View& to) {
  const OpenClBuffer &source = buffer_of(from), &target = buffer_of(to);
  cl_int result = CL_SUCCESS;
  if (source.place() == Place::kDevice && target.place() == Place::kDevice) {
    result = core_.api.clEnqueueCopyBuffer(queue_, source.object(), target.object(), from.offset, to.offset, from.size,
                                           0, nullptr, nullptr);
  } else if (source.place() == Place::kDevice) {
    result = core_.api.clEnqueueReadBuffer(queue_, source.object(), CL_FALSE, from.offset, from.size, to.data(), 0,
                                           nullptr, nullptr);
  } else if (target.place() == Place::kDevice) {
    result = core_.api.clEnqueueWriteBuffer(queue_, target.object(), CL_FALSE, to.offset, to.size, from.data(), 0,
                                            nullptr, nullptr);
  } else {
    wait();
    std::memcpy(to.data(), from.data(), from.size);
  }
  core_.check(result, "copying");
}

void OpenClStream::clear(const View& view) {
  const OpenClBuffer& buffer = buffer_of(view);
  if (buffer.place() != Place::kDevice) {
    wait();
    std::memset(view.data(), 0, view.size);
    return;
  }
  const cl_uint zero = 0;
  core_.check(core_.api.clEnqueueFillBuffer(queue_, buffer.object(), &zero, sizeof(zero), view.offset, view.size, 0,
                                            nullptr, nullptr),
              "clearing memory");
}

void OpenClStream::submit() { core_.check(core_.api.clFlush(queue_), "running kernels"); }

void OpenClStream::wait() { core_.check(core_.api.clFinish(queue_), "waiting for kernels"); }

void OpenClStream::mark() {
  if (marks_.size() >= kMaxMarks) throw Error(ErrorKind::kInternal, "too many marks");
  cl_event event = nullptr;
  core_.check(core_.api.clEnqueueMarkerWithWaitList(queue_, 0, nullptr, &event), "noting the time");
  marks_.push_back(event);
}

std::vector<double> OpenClStream::marks() {
  std::vector<double> seconds;
  for (cl_event event : std::exchange(marks_, {})) {
    cl_ulong time = 0;
    const cl_int result =
        core_.api.clGetEventProfilingInfo(event, CL_PROFILING_COMMAND_END, sizeof(time), &time, nullptr);
    core_.api.clReleaseEvent(event);
    core_.check(result, "reading times");
    seconds.push_back(static_cast<double>(time) * 1e-9);
  }
  return seconds;
}

}  // namespace cfmoe::device
