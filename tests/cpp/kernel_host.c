/* Runs compiled kernels that are linked in, on buffers and calls out of a file: kernel_host INPUT OUTPUT
 *
 * KERNELS names a file with a line KERNEL(name) for each. Numbers are int64, little-endian. INPUT: how many buffers;
 * for each the code, bits and dimensions of its type and shape, then its elements. How many calls; for each the
 * kernel's number, how many arguments, and for each 0 and a number or 1 and a buffer's number. OUTPUT: the elements of
 * all buffers. The test that writes INPUT is trusted.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

typedef int (*Kernel)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
#define KERNEL(name) extern int __tvm_ffi_##name(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
#include KERNELS
#undef KERNEL
#define KERNEL(name) __tvm_ffi_##name,
static const Kernel kernels[] = {
#include KERNELS
};

enum { MOST_DIMENSIONS = 4, MOST_ARGUMENTS = 16 };

typedef struct {
  DLTensor tensor;
  int64_t shape[MOST_DIMENSIONS];
  size_t bytes;
} Buffer;

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup;
typedef int (*ParallelLambda)(int task, ParallelGroup* group, void* data);

extern void *__TVMBackendParallelLaunch, *__TVMBackendAllocWorkspace, *__TVMBackendFreeWorkspace;

static int launch(ParallelLambda lambda, void* data, int tasks) {
  ParallelGroup group = {NULL, tasks > 0 ? tasks : 2};
  for (int task = 0; task < group.num_task; ++task) {
    if (lambda(task, &group, data) != 0) return -1;
  }
  return 0;
}

static void* allocate(int device, int number, uint64_t bytes, int code, int bits) {
  (void)device, (void)number, (void)code, (void)bits;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int release(int device, int number, void* memory) {
  (void)device, (void)number;
  free(memory);
  return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputs("\n", stderr);
}

static void fail(const char* what) {
  fprintf(stderr, "kernel_host: %s\n", what);
  exit(1);
}

static int64_t number(FILE* file) {
  int64_t value;
  if (fread(&value, sizeof(value), 1, file) != 1) fail("the input ends early");
  return value;
}

static void read_buffer(FILE* file, Buffer* buffer) {
  DLTensor* tensor = &buffer->tensor;
  tensor->device.device_type = kDLCPU;
  tensor->dtype.code = (uint8_t)number(file);
  tensor->dtype.bits = (uint8_t)number(file);
  tensor->dtype.lanes = 1;
  tensor->ndim = (int32_t)number(file);
  if (tensor->ndim > MOST_DIMENSIONS) fail("too many dimensions");
  tensor->shape = buffer->shape;
  buffer->bytes = tensor->dtype.bits / 8;
  for (int32_t i = 0; i < tensor->ndim; ++i) {
    buffer->shape[i] = number(file);
    buffer->bytes *= (size_t)buffer->shape[i];
  }
  tensor->data = aligned_alloc(64, (buffer->bytes + 63) / 64 * 64);
  if (tensor->data == NULL || fread(tensor->data, 1, buffer->bytes, file) != buffer->bytes)
    fail("the input ends early");
}

int main(int argc, char** argv) {
  FILE *input = argc == 3 ? fopen(argv[1], "rb") : NULL, *output = argc == 3 ? fopen(argv[2], "wb") : NULL;
  if (input == NULL || output == NULL) fail("usage: kernel_host INPUT OUTPUT");
  __TVMBackendParallelLaunch = (void*)launch;
  __TVMBackendAllocWorkspace = (void*)allocate;
  __TVMBackendFreeWorkspace = (void*)release;
  const int64_t count = number(input);
  Buffer* buffers = calloc((size_t)count, sizeof(Buffer));
  if (buffers == NULL) fail("out of memory");
  for (int64_t i = 0; i < count; ++i) read_buffer(input, &buffers[i]);
  for (int64_t calls = number(input); calls > 0; --calls) {
    const Kernel kernel = kernels[number(input)];
    const int64_t arguments = number(input);
    if (arguments > MOST_ARGUMENTS) fail("too many arguments");
    TVMFFIAny given[MOST_ARGUMENTS] = {0}, result = {0};
    for (int64_t i = 0; i < arguments; ++i) {
      const int64_t is_buffer = number(input), value = number(input);
      given[i].type_index = is_buffer ? kTVMFFIDLTensorPtr : kTVMFFIInt;
      if (is_buffer) {
        given[i].v_ptr = &buffers[value].tensor;
      } else {
        given[i].v_int64 = value;
      }
    }
    if (kernel(NULL, given, (int32_t)arguments, &result) != 0) fail("a kernel refused its arguments");
  }
  for (int64_t i = 0; i < count; ++i) {
    if (fwrite(buffers[i].tensor.data, 1, buffers[i].bytes, output) != buffers[i].bytes)
      fail("the output cannot be written");
  }
  return fclose(output) == 0 ? 0 : 1;
}
