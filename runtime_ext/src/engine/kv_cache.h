// Keys and values of the conversation: plain buffers, one pair per layer, of a fixed number of rows.
#pragma once

#include <cstdint>

#include "engine/plan.h"
#include "store/aligned_buffer.h"

namespace cfmoe {

class KvCache {
 public:
  // `context` rows, a multiple of 16. Every pair is 64-byte aligned.
  KvCache(const PlanKv& plan, int64_t context)
      : k_bytes_(padded_bytes(plan.dtype, plan.k_shape, context)),
        v_bytes_(padded_bytes(plan.dtype, plan.v_shape, context)),
        buffer_(bytes(plan, context)) {}

  static uint64_t bytes(const PlanKv& plan, int64_t context) {
    return static_cast<uint64_t>(plan.layers) *
           (padded_bytes(plan.dtype, plan.k_shape, context) + padded_bytes(plan.dtype, plan.v_shape, context));
  }
  uint64_t k_bytes() const { return k_bytes_; }  // of one layer
  uint64_t v_bytes() const { return v_bytes_; }
  void* k(int32_t layer) const { return buffer_.data() + static_cast<uint64_t>(layer) * (k_bytes_ + v_bytes_); }
  void* v(int32_t layer) const {
    return buffer_.data() + static_cast<uint64_t>(layer) * (k_bytes_ + v_bytes_) + k_bytes_;
  }

 private:
  static uint64_t padded_bytes(DType dtype, const Shape& shape, int64_t context) {
    return (tensor_bytes(dtype, shape, {1, 0, context}) + 63) / 64 * 64;
  }

  uint64_t k_bytes_, v_bytes_;
  AlignedBuffer buffer_;
};

}  // namespace cfmoe
