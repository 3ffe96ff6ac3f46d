// A library of kernels as the compiler would make one, for a toy model: arithmetic on small integers, exact in fp32,
// the same for one token as for many. Expert kernels read their record, so a wrong slot, row or tile changes the
// result.
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <cstdint>

#define KERNEL(name)                                                      \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_##name( \
      void*, [[maybe_unused]] const TVMFFIAny* args, int32_t count, TVMFFIAny*)

extern "C" {
struct ParallelGroup {
  void* sync_handle;
  int32_t num_task;
};
using ParallelLambda = int (*)(int, ParallelGroup*, void*);
__attribute__((visibility("default"))) int (*__TVMBackendParallelLaunch)(ParallelLambda, void*, int) = nullptr;
}

namespace {

DLTensor* tensor(const TVMFFIAny& any) { return static_cast<DLTensor*>(any.v_ptr); }
template <typename T>
T* data(const TVMFFIAny& any) {
  return static_cast<T*>(tensor(any)->data);
}
int64_t extent(const TVMFFIAny& any, int dimension) { return tensor(any)->shape[dimension]; }

bool well_formed(const TVMFFIAny* args, int32_t count) {
  for (int32_t i = 0; i < count; ++i) {
    if (args[i].type_index == kTVMFFIInt) continue;
    if (args[i].type_index != kTVMFFIDLTensorPtr) return false;
    const DLTensor* t = tensor(args[i]);
    if (reinterpret_cast<uintptr_t>(t->data) % 64 != 0 || t->byte_offset != 0 || t->device.device_type != kDLCPU)
      return false;
  }
  return true;
}

int fail(const char* message) {
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return -1;
}

float small(uint64_t x) { return static_cast<float>((x * 0x9e3779b97f4a7c15U >> 40) % 64); }

}  // namespace

// (tokens [n], embedding, hidden [n, 64])
KERNEL(embed) {
  if (count != 3 || !well_formed(args, count)) return fail("embed: bad arguments");
  for (int64_t t = 0; t < extent(args[0], 0); ++t) {
    const auto token = static_cast<uint64_t>(data<int32_t>(args[0])[t]);
    for (uint64_t j = 0; j < 64; ++j) data<float>(args[2])[t * 64 + j] = small(token * 64 + j);
  }
  return 0;
}

// (hidden [n, 64], k_cache, v_cache, position): mixes in the first value of every earlier token.
KERNEL(attend) {
  if (count != 4 || !well_formed(args, count)) return fail("attend: bad arguments");
  auto* hidden = data<float>(args[0]);
  auto *keys = data<uint16_t>(args[1]), *values = data<uint16_t>(args[2]);
  for (int64_t t = 0; t < extent(args[0], 0); ++t) {
    const int64_t at = args[3].v_int64 + t;
    keys[at] = values[at] = static_cast<uint16_t>(static_cast<int64_t>(hidden[t * 64]) & 63);
    uint64_t sum = 0;
    for (int64_t i = 0; i <= at; ++i) sum = sum * 31 + keys[i] + values[i];
    for (uint64_t j = 0; j < 64; ++j) hidden[t * 64 + j] = small(static_cast<uint64_t>(hidden[t * 64 + j]) + sum + j);
  }
  return 0;
}

namespace {
struct RouteData {
  const TVMFFIAny* args;
};
int route_rows(int task, ParallelGroup* group, void* opaque) {
  const TVMFFIAny* args = static_cast<RouteData*>(opaque)->args;
  const int64_t n = extent(args[0], 0);
  for (int64_t t = n * task / group->num_task; t < n * (task + 1) / group->num_task; ++t) {
    const float* hidden = data<float>(args[0]) + t * 64;
    for (int64_t e = 0; e < extent(args[1], 1); ++e)
      data<float>(args[1])[t * extent(args[1], 1) + e] = hidden[e] * 0.25F;
    for (int64_t j = 0; j < 32; ++j) data<int32_t>(args[2])[t * 32 + j] = static_cast<int32_t>(hidden[j]);
  }
  return 0;
}
}  // namespace

// (hidden [n, 64], logits [n, 16], activation [n, 32]), in parallel.
KERNEL(route_logits) {
  if (count != 3 || !well_formed(args, count)) return fail("route_logits: bad arguments");
  RouteData route{args};
  return __TVMBackendParallelLaunch(route_rows, &route, 0);
}

// (activation [n, 32], rows [m], slab int32, slab float16, scratch [m, 16], word_offset, begin, end)
KERNEL(gate_up) {
  if (count != 8 || !well_formed(args, count)) return fail("gate_up: bad arguments");
  const uint32_t* record = data<uint32_t>(args[2]) + args[5].v_int64;
  if (args[5].v_int64 + 5000 > extent(args[2], 0)) return fail("gate_up: the record lies outside the slab");
  for (int64_t tile = args[6].v_int64; tile < args[7].v_int64; ++tile) {
    for (int64_t r = 0; r < extent(args[1], 0); ++r) {
      const int32_t* activation = data<int32_t>(args[0]) + int64_t{data<int32_t>(args[1])[r]} * 32;
      for (int64_t j = 0; j < 16; ++j) {
        data<int32_t>(args[4])[r * 16 + j] =
            static_cast<int32_t>((record[j] + static_cast<uint32_t>(activation[j])) & 0xffff);
      }
    }
  }
  return 0;
}

// (scratch [m, 16], rows [m], slab int32, slab float16, out [n * 2, 64], word_offset, begin, end)
KERNEL(down) {
  if (count != 8 || !well_formed(args, count)) return fail("down: bad arguments");
  const uint32_t* record = data<uint32_t>(args[2]) + args[5].v_int64 + 3200;
  for (int64_t r = 0; r < extent(args[0], 0); ++r) {
    float* out = data<float>(args[4]) + int64_t{data<int32_t>(args[1])[r]} * 64;
    for (int64_t j = args[6].v_int64 * 32; j < args[7].v_int64 * 32; ++j) {
      out[j] = small(static_cast<uint32_t>(data<int32_t>(args[0])[r * 16 + j % 16]) + (record[j] & 0xffffU));
    }
  }
  return 0;
}

// (rows [n * 2, 64], weights [n, 2], hidden [n, 64])
KERNEL(combine) {
  if (count != 3 || !well_formed(args, count)) return fail("combine: bad arguments");
  for (int64_t t = 0; t < extent(args[2], 0); ++t) {
    const float* weights = data<float>(args[1]) + t * 2;
    const float* rows = data<float>(args[0]) + t * 128;
    for (int64_t j = 0; j < 64; ++j) {
      const float mixed = weights[0] * rows[j] + weights[1] * rows[64 + j];
      data<float>(args[2])[t * 64 + j] += static_cast<float>(static_cast<int32_t>(mixed));
    }
  }
  return 0;
}

// (hidden [1, 64], logits [1, 100])
KERNEL(head) {
  if (count != 2 || !well_formed(args, count)) return fail("head: bad arguments");
  uint64_t sum = 0;
  for (int64_t j = 0; j < 64; ++j) sum = sum * 131 + static_cast<uint64_t>(data<float>(args[0])[j]);
  for (uint64_t v = 0; v < 100; ++v) data<float>(args[1])[v] = small(sum + v * 7919) + static_cast<float>(v) * 0.001F;
  return 0;
}

KERNEL(broken) { return count == 0 ? 0 : fail("broken on purpose"); }

// (ids [n, 2]): leaves what no router would.
KERNEL(spoil) {
  if (count != 1 || !well_formed(args, count)) return fail("spoil: bad arguments");
  for (int64_t i = 0; i < extent(args[0], 0) * 2; ++i) data<int32_t>(args[0])[i] = 1000;
  return 0;
}
