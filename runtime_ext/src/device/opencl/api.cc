// Looks OpenCL's functions up, and says in words what its results mean.
#include "device/opencl/api.h"

#include "device/shared_library.h"
#include "error.h"

namespace cfmoe::device {

const OpenClApi& opencl_api() {
  static const OpenClApi api = [] {
    static const SharedLibrary library({"libOpenCL.so.1", "libOpenCL.so", "/vendor/lib64/libOpenCL.so",
                                        "/system/vendor/lib64/libOpenCL.so", "libGLES_mali.so", "libPVROCL.so"});
    if (!library.is_open()) {
      throw Error("OpenCL's loader is not installed (" + library.reason() +
                  "): install ocl-icd-libopencl1 and the driver of your GPU, or use --device cpu");
    }
    OpenClApi out;
#define CFMOE_OPENCL_LOAD(name)                                           \
  out.name = reinterpret_cast<decltype(out.name)>(library.symbol(#name)); \
  if (out.name == nullptr)                                                \
    throw Error("OpenCL's loader has no " #name ", 1.2 is needed: update it, or use --device cpu");
    CFMOE_OPENCL(CFMOE_OPENCL_LOAD)
#undef CFMOE_OPENCL_LOAD
#define CFMOE_OPENCL_LOAD(name) out.name = reinterpret_cast<decltype(out.name)>(library.symbol(#name));
    CFMOE_OPENCL_SVM(CFMOE_OPENCL_LOAD)
#undef CFMOE_OPENCL_LOAD
    return out;
  }();
  return api;
}

void opencl_check(cl_int result, const std::string& doing) {
  switch (result) {
    case CL_SUCCESS: return;
    case CL_MEM_OBJECT_ALLOCATION_FAILURE:
    case CL_OUT_OF_HOST_MEMORY:
    case CL_INVALID_BUFFER_SIZE:
      throw Error("OpenCL: out of device memory while " + doing +
                  ": use a smaller --memory-budget or --context-size, or --device cpu");
    case CL_OUT_OF_RESOURCES:
    case CL_DEVICE_NOT_AVAILABLE:
    case CL_INVALID_COMMAND_QUEUE:
      throw Error(ErrorKind::kInternal, "OpenCL: the device was lost or is out of resources while " + doing +
                                            ": run again, use a smaller --memory-budget, update the driver, or use "
                                            "--device cpu");
    default:
      throw Error("OpenCL: error " + std::to_string(result) + " while " + doing +
                  ": update the driver, or use --device cpu");
  }
}

}  // namespace cfmoe::device
