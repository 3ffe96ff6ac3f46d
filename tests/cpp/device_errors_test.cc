// What drivers' results become: messages that say what failed while what was done, and what to do about it.
#include <doctest/doctest.h>

#include <functional>
#include <string>

#include "device/opencl/api.h"
#include "device/vulkan/api.h"
#include "expect_error.h"

namespace cfmoe::device {
namespace {

using test::expect_error;

ErrorKind kind_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.kind();
  }
  FAIL("no error");
  return ErrorKind::kInternal;
}

}  // namespace

TEST_CASE("device errors: Vulkan's results name the remedy") {
  for (const VkResult good : {VK_SUCCESS, VK_INCOMPLETE}) CHECK_NOTHROW(vulkan_check(good, "waiting"));
  for (const VkResult memory : {VK_ERROR_OUT_OF_DEVICE_MEMORY, VK_ERROR_OUT_OF_HOST_MEMORY}) {
    expect_error([&] { vulkan_check(memory, "allocating 4 MiB"); },
                 {"out of device memory", "allocating 4 MiB", "--memory-budget", "--device cpu"});
    CHECK(kind_of([&] { vulkan_check(memory, ""); }) == ErrorKind::kUser);
  }
  expect_error([] { vulkan_check(VK_ERROR_DEVICE_LOST, "waiting"); },
               {"the device was lost", "while waiting", "run again", "--device cpu"});
  CHECK(kind_of([] { vulkan_check(VK_ERROR_DEVICE_LOST, ""); }) == ErrorKind::kInternal);
  for (const VkResult driver : {VK_ERROR_INITIALIZATION_FAILED, VK_ERROR_INCOMPATIBLE_DRIVER}) {
    expect_error([&] { vulkan_check(driver, "opening"); }, {"no driver works", "install the driver", "--device cpu"});
  }
  expect_error([] { vulkan_check(VK_ERROR_TOO_MANY_OBJECTS, "waiting"); }, {"error -10", "update the driver"});
}

TEST_CASE("device errors: OpenCL's results name the remedy") {
  CHECK_NOTHROW(opencl_check(CL_SUCCESS, "waiting"));
  for (const cl_int memory : {CL_MEM_OBJECT_ALLOCATION_FAILURE, CL_OUT_OF_HOST_MEMORY, CL_INVALID_BUFFER_SIZE}) {
    expect_error([&] { opencl_check(memory, "allocating 4 MiB"); },
                 {"out of device memory", "allocating 4 MiB", "--memory-budget", "--device cpu"});
    CHECK(kind_of([&] { opencl_check(memory, ""); }) == ErrorKind::kUser);
  }
  for (const cl_int lost : {CL_OUT_OF_RESOURCES, CL_DEVICE_NOT_AVAILABLE, CL_INVALID_COMMAND_QUEUE}) {
    expect_error([&] { opencl_check(lost, "waiting"); }, {"the device was lost", "while waiting", "--device cpu"});
    CHECK(kind_of([&] { opencl_check(lost, ""); }) == ErrorKind::kInternal);
  }
  expect_error([] { opencl_check(CL_INVALID_KERNEL_ARGS, "running"); }, {"error -52", "update the driver"});
}

}  // namespace cfmoe::device
