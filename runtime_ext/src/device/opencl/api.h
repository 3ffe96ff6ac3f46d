// The OpenCL functions that we call, taken from the loader while the program runs.
#pragma once

#define CL_TARGET_OPENCL_VERSION 200
#define CL_USE_DEPRECATED_OPENCL_1_2_APIS
#include <CL/cl.h>

#include <string>

namespace cfmoe::device {

// The formatter never agrees with itself about these lists.
// clang-format off
#define CFMOE_OPENCL(F) \
  F(clGetPlatformIDs) F(clGetPlatformInfo) F(clGetDeviceIDs) F(clGetDeviceInfo) F(clCreateContext) \
  F(clReleaseContext) F(clCreateCommandQueue) F(clReleaseCommandQueue) F(clCreateBuffer) F(clCreateSubBuffer) \
  F(clReleaseMemObject) F(clCreateProgramWithSource) F(clCreateProgramWithBinary) F(clBuildProgram) \
  F(clGetProgramInfo) F(clGetProgramBuildInfo) F(clReleaseProgram) F(clCreateKernel) F(clReleaseKernel) \
  F(clSetKernelArg) F(clGetKernelInfo) F(clEnqueueNDRangeKernel) F(clEnqueueReadBuffer) F(clEnqueueWriteBuffer) \
  F(clEnqueueCopyBuffer) F(clEnqueueFillBuffer) F(clEnqueueMarkerWithWaitList) F(clFlush) F(clFinish) \
  F(clGetEventProfilingInfo) F(clReleaseEvent)
// Since OpenCL 2.0; null where the loader is older.
#define CFMOE_OPENCL_SVM(F) \
  F(clSVMAlloc) F(clSVMFree) F(clSetKernelArgSVMPointer)
// clang-format on

struct OpenClApi {
#define CFMOE_OPENCL_DECLARE(name) decltype(&::name) name = nullptr;
  CFMOE_OPENCL(CFMOE_OPENCL_DECLARE)
  CFMOE_OPENCL_SVM(CFMOE_OPENCL_DECLARE)
#undef CFMOE_OPENCL_DECLARE
};

// Opens the loader once. Throws cfmoe::Error where there is none.
const OpenClApi& opencl_api();

// Throws cfmoe::Error for what is no success, in words that say what to do.
void opencl_check(cl_int result, const std::string& doing);

}  // namespace cfmoe::device
