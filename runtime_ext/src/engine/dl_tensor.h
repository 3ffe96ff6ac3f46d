// Small makers of the structs that kernels take.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <cstdint>

#include "engine/plan.h"

namespace cfmoe {

inline DLDataType to_dl_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return {kDLFloat, 32, 1};
    case DType::kFloat16: return {kDLFloat, 16, 1};
    case DType::kInt32: return {kDLInt, 32, 1};
    case DType::kUInt32: return {kDLUInt, 32, 1};
    case DType::kInt8: return {kDLInt, 8, 1};
    case DType::kUInt8: return {kDLUInt, 8, 1};
    case DType::kInt64: return {kDLInt, 64, 1};
  }
  return {kDLFloat, 32, 1};
}

// Compact, in host memory.
inline DLTensor make_tensor(void* data, DLDataType dtype, int32_t dimensions, int64_t* shape) {
  return {data, {kDLCPU, 0}, dimensions, dtype, shape, nullptr, 0};
}

inline TVMFFIAny tensor_argument(DLTensor* tensor) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIDLTensorPtr;
  any.v_ptr = tensor;
  return any;
}

inline TVMFFIAny integer_argument(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

}  // namespace cfmoe
