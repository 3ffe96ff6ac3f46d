// Vulkan and OpenCL devices, on the software drivers that tests have (lavapipe, PoCL): memory, kernels, order, caches,
// errors. Drivers are built without ThreadSanitizer, which therefore cannot follow them.
#include "device/device.h"

#include <dlfcn.h>
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "device/kernel_cache.h"
#include "device/recorder.h"
#include "engine/model_memory.h"
#include "expect_error.h"
#include "fixtures.h"
#include "shaders/multiply_add.h"

#if defined(__SANITIZE_ADDRESS__)
// What drivers keep until the process ends is theirs.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() {
  return "leak:libvulkan\nleak:libVkLayer\nleak:libpocl\nleak:libOpenCL\nleak:libLLVM\nleak:libclang\n";
}
#endif

namespace cfmoe::device {
namespace {

using test::expect_error;

constexpr char kOpenClSource[] =
    "__kernel void multiply_add(__global const float* a, __global float* c, int n, int factor) {\n"
    "  int i = get_global_id(0);\n"
    "  if (i < n) c[i] = a[i] * factor + c[i];\n"
    "}\n";

// Sets a variable of the environment while it lives.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) { ::setenv(name, value.c_str(), 1); }
  ~Variable() { ::unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
};

// The loader unloads drivers with their last device, and then nobody can tell whose memory was whose.
[[maybe_unused]] void keep_drivers_loaded() {
  for (const char* name :
       {"libvulkan_lvp.so", "libVkLayer_khronos_validation.so", "libVkLayer_MESA_device_select.so", "libpocl.so.2"}) {
    ::dlopen(name, RTLD_NOW | RTLD_NODELETE);
  }
}

std::string library(Kind kind) {
  if (kind == Kind::kOpenCl) return kOpenClSource;
  return std::string(reinterpret_cast<const char*>(kMultiplyAdd), sizeof(kMultiplyAdd));
}

KernelCode code(Kind kind, const std::string& text) {
  KernelCode out;
  out.name = "multiply_add";
  out.entry = kind == Kind::kOpenCl ? "multiply_add" : "main";
  out.bytes = text.size();
  out.local = {64, 1, 1};
  out.buffers = 2;
  out.scalars = 2;
  out.writes = {1};
  return out;
}

std::vector<std::unique_ptr<Kernel>> load(Device& device, const std::string& text) {
  const KernelCode kernel = code(device.facts().kind, text);
  return device.load(text, {&kernel, 1}, 1);
}

[[maybe_unused]] std::vector<float> read_back(Device& device, const View& view) {
  const auto host = device.allocate(view.size, Memory::kHost);
  const auto stream = device.make_stream();
  stream->copy(view, {host.get(), 0, view.size});
  stream->submit();
  stream->wait();
  std::vector<float> out(view.size / sizeof(float));
  std::memcpy(out.data(), host->data(), view.size);
  return out;
}

// Two buffers of 1,000 numbers at odd places of one block, and a kernel over them.
struct Fixture {
  explicit Fixture(Device& the_device) : device(the_device), kernels(load(device, library(device.facts().kind))) {
    const uint64_t step = std::max<uint64_t>(512, device.facts().offset_alignment);
    block = device.allocate(64 * step, Memory::kModel);
    a = {block.get(), step, 4000};
    c = {block.get(), 32 * step, 4000};
    std::vector<float> ones(1000, 1.0F), twos(1000, 2.0F);
    Uploader uploader(device);
    uploader.clear(*block);
    uploader.write(a, reinterpret_cast<const std::byte*>(ones.data()));
    uploader.write(c, reinterpret_cast<const std::byte*>(twos.data()));
    const View forward[] = {a, c}, backward[] = {c, a};
    into_c = device.bind(*kernels[0], forward);
    into_a = device.bind(*kernels[0], backward);
  }
  Device& device;
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::unique_ptr<Buffer> block;
  View a, c;
  std::unique_ptr<Bindings> into_c, into_a;
};

class CountingStream final : public Stream {
 public:
  void dispatch(const Bindings&, std::span<const int32_t>, const std::array<uint32_t, 3>&) override { ++dispatches; }
  void copy(const View&, const View&) override {}
  void clear(const View&) override {}
  void barrier() override { ++barriers; }
  void submit() override { ++submits; }
  void wait() override { ++waits; }
  void mark() override {}
  std::vector<double> marks() override { return {}; }
  int dispatches = 0, barriers = 0, submits = 0, waits = 0;
};

class PlainBuffer final : public Buffer {
 public:
  PlainBuffer() { size_ = 4096; }
};

}  // namespace

#if !defined(__SANITIZE_THREAD__)

TEST_CASE("devices compute in order, in mapped memory and in memory of their own") {
  keep_drivers_loaded();
  const test::TempDir cache;
  const Variable variable("CFMOE_CACHE_DIR", cache.path());
  for (const Kind kind : {Kind::kVulkan, Kind::kOpenCl}) {
    for (const bool separate : {false, true}) {
      OpenOptions options;
      options.separate = separate;
      const auto device = open_device(kind, options);
      INFO(device->facts().name);
      CHECK(device->facts().unified == !separate);
      CHECK(device->facts().memory_bytes > 0);
      CHECK(device->available_memory() > 0);
      Fixture fixture(*device);
      CHECK((fixture.block->data() == nullptr) == separate);
      if (!separate) CHECK(reinterpret_cast<uintptr_t>(fixture.block->data()) % 4096 == 0);
      const auto stream = device->make_stream();
      Recorder recorder(*stream);
      const int32_t twice[] = {1000, 2}, thrice[] = {999, 3};
      stream->mark();
      recorder.dispatch(*fixture.into_c, twice, {16, 1, 1});   // c = 1 * 2 + 2 = 4
      recorder.dispatch(*fixture.into_a, thrice, {16, 1, 1});  // a = 4 * 3 + 1 = 13, but for the last
      recorder.submit();
      recorder.dispatch(*fixture.into_c, twice, {16, 1, 1});  // c = 13 * 2 + 4 = 30
      stream->mark();
      recorder.finish();
      const std::vector<double> marks = stream->marks();
      REQUIRE(marks.size() == 2);
      CHECK(marks[1] > marks[0]);
      const std::vector<float> c = read_back(*device, fixture.c), a = read_back(*device, fixture.a);
      CHECK(c[0] == 30.0F);
      CHECK(c[998] == 30.0F);
      CHECK(c[999] == 6.0F);
      CHECK(a[500] == 13.0F);
      CHECK(a[999] == 1.0F);
      for (int i = 0; i < 100; ++i) {
        recorder.dispatch(*fixture.into_c, twice, {16, 1, 1});
        recorder.submit();
        if (i % 30 == 29) recorder.finish();
      }
      recorder.finish();
      CHECK(read_back(*device, fixture.c)[3] == 30.0F + 100 * 26.0F);
    }
  }
}

TEST_CASE("deferred commands run behind those that are recorded after them") {
  keep_drivers_loaded();
  const test::TempDir cache;
  const Variable variable("CFMOE_CACHE_DIR", cache.path());
  const auto device = open_device(Kind::kVulkan, {});
  Fixture fixture(*device);
  const auto stream = device->make_stream();
  Recorder recorder(*stream);
  REQUIRE(recorder.can_defer());
  const int32_t once[] = {1000, 1}, twice[] = {1000, 2};
  recorder.dispatch(*fixture.into_c, once, {16, 1, 1});  // c = 1 + 2 = 3
  recorder.submit();
  recorder.begin_deferred();
  recorder.dispatch(*fixture.into_c, twice, {16, 1, 1});
  recorder.end_deferred();
  recorder.finish();
  CHECK(read_back(*device, fixture.c)[7] == 3.0F);
  recorder.dispatch(*fixture.into_a, once, {16, 1, 1});  // a = 3 + 1 = 4
  recorder.finish();
  CHECK(read_back(*device, fixture.c)[7] == 3.0F);
  recorder.dispatch(*fixture.into_a, once, {16, 1, 1});  // a = 3 + 4 = 7
  recorder.submit_deferred();                            // c = 7 * 2 + 3 = 17
  // The next ones are recorded while these run, and forgotten.
  recorder.begin_deferred();
  recorder.dispatch(*fixture.into_c, twice, {16, 1, 1});
  recorder.drop_deferred();
  recorder.finish();
  CHECK(read_back(*device, fixture.c)[7] == 17.0F);
  recorder.submit_deferred();
  recorder.finish();
  CHECK(read_back(*device, fixture.c)[7] == 17.0F);
  // Alone, without anything recorded in front.
  recorder.begin_deferred();
  recorder.dispatch(*fixture.into_c, once, {16, 1, 1});
  recorder.end_deferred();
  recorder.submit_deferred();
  recorder.finish();
  CHECK(read_back(*device, fixture.c)[7] == 24.0F);
}

TEST_CASE("the validation layer hears of a barrier that is missing, and of nothing else") {
  keep_drivers_loaded();
  const test::TempDir cache;
  const Variable variable("CFMOE_CACHE_DIR", cache.path());
  OpenOptions options;
  options.validate = true;
  const int32_t scalars[] = {1000, 2};
  const auto device = open_device(Kind::kVulkan, options);
  Fixture fixture(*device);
  const auto stream = device->make_stream();
  Recorder recorder(*stream);
  for (int i = 0; i < 3; ++i) {
    recorder.dispatch(*fixture.into_c, scalars, {16, 1, 1});
    recorder.dispatch(*fixture.into_a, scalars, {16, 1, 1});
    recorder.submit();
  }
  for (int i = 0; i < 3; ++i) {
    recorder.begin_deferred();
    recorder.dispatch(*fixture.into_c, scalars, {16, 1, 1});
    recorder.end_deferred();
    recorder.finish();
    recorder.dispatch(*fixture.into_a, scalars, {16, 1, 1});
    recorder.submit_deferred();
  }
  CHECK_NOTHROW(recorder.finish());
  stream->dispatch(*fixture.into_c, scalars, {16, 1, 1});
  stream->dispatch(*fixture.into_a, scalars, {16, 1, 1});
  stream->submit();
  CHECK_THROWS_WITH_AS(stream->wait(), doctest::Contains("SYNC-HAZARD"), Error);
}

TEST_CASE("kernels that are none, or not for this device, are named") {
  keep_drivers_loaded();
  const test::TempDir cache;
  const Variable variable("CFMOE_CACHE_DIR", cache.path());
  for (const Kind kind : {Kind::kVulkan, Kind::kOpenCl}) {
    const auto device = open_device(kind, {});
    const std::string good = library(kind);
    const auto with = [&](auto change) {
      KernelCode kernel = code(kind, good);
      change(kernel);
      return device->load(good, {&kernel, 1}, 2);
    };
    expect_error([&] { with([](KernelCode& k) { k.bytes += 4; }); }, {"multiply_add", "outside its library"});
    expect_error([&] { with([](KernelCode& k) { k.offset = uint64_t{1} << 63; }); }, {"outside its library"});
    expect_error([&] { with([](KernelCode& k) { k.local = {4096, 4096, 1}; }); }, {"workgroups of", "--device cpu"});
    expect_error([&] { with([](KernelCode& k) { k.scalars = 1 << 20; }); }, {"scalars, too many"});
    const std::string bad = kind == Kind::kVulkan ? std::string(64, 'x') : "__kernel void multiply_add( { }";
    expect_error([&] { load(*device, bad); },
                 {kind == Kind::kVulkan ? "multiply_add is no SPIR-V" : "the kernels do not compile"});
    const auto kernels = load(*device, good);
    const auto buffer = device->allocate(4096, Memory::kModel);
    const View one[] = {{buffer.get(), 0, 64}};
    CHECK_THROWS_AS(device->bind(*kernels[0], one), Error);
    const View outside[] = {{buffer.get(), 0, 64}, {buffer.get(), 2048, 4096}};
    CHECK_THROWS_AS(device->bind(*kernels[0], outside), Error);
    expect_error([&] { device->allocate(uint64_t{1} << 46, Memory::kModel); },
                 {"out of device memory", "--memory-budget"});
  }
}

TEST_CASE("compiled kernels are kept on disk, and what is damaged there is made anew") {
  keep_drivers_loaded();
  for (const Kind kind : {Kind::kVulkan, Kind::kOpenCl}) {
    const test::TempDir cache;
    const Variable variable("CFMOE_CACHE_DIR", cache.path() + "/new");
    load(*open_device(kind, {}), library(kind));
    std::string path;
    for (const auto& entry : std::filesystem::directory_iterator(cache.path() + "/new")) path = entry.path();
    REQUIRE(!path.empty());
    const std::string kept = test::read_file(path);
    for (const std::string& bytes : {std::string(), kept.substr(0, kept.size() / 2), std::string(5000, 'x'),
                                     kept.substr(0, kept.size() - 1) + "?"}) {
      test::write_file(path, bytes);
      const auto device = open_device(kind, {});
      CHECK_NOTHROW(load(*device, library(kind)));
      CHECK(test::read_file(path).size() == kept.size());
    }
    const Variable nowhere("CFMOE_CACHE_DIR", "/proc/nowhere");
    CHECK_NOTHROW(load(*open_device(kind, {}), library(kind)));
  }
}

TEST_CASE("devices are listed, and chosen by name or number") {
  keep_drivers_loaded();
  for (const Kind kind : {Kind::kVulkan, Kind::kOpenCl}) {
    const std::vector<Facts> devices = list_devices(kind);
    REQUIRE(!devices.empty());
    CHECK(!devices[0].name.empty());
    CHECK(!devices[0].driver.empty());
    OpenOptions options;
    options.device = devices.back().name.substr(0, 5);
    CHECK(open_device(kind, options)->facts().name == devices.back().name);
    options.device = "No such GPU";
    expect_error([&] { open_device(kind, options); }, {"No such GPU", devices[0].name});
  }
}

#endif

TEST_CASE("the best device is a discrete one, then an integrated one") {
  std::vector<Facts> devices(3);
  const Type types[] = {Type::kCpu, Type::kDiscrete, Type::kIntegrated};
  for (size_t i = 0; i < 3; ++i) {
    devices[i].type = types[i];
    devices[i].name = std::string("GPU ") + type_name(types[i]);
  }
  CHECK(choose_device(Kind::kVulkan, devices, "") == 1);
  CHECK(choose_device(Kind::kVulkan, std::span(devices).first(1), "") == 0);
  CHECK(choose_device(Kind::kVulkan, devices, "integrated") == 2);
  CHECK(choose_device(Kind::kVulkan, devices, "0") == 0);
  expect_error([&] { choose_device(Kind::kVulkan, devices, "3"); }, {"CFMOE_VULKAN_DEVICE 3", "1 GPU discrete"});
  expect_error([] { choose_device(Kind::kOpenCl, {}, ""); }, {"no opencl device", "pocl-opencl-icd", "--device cpu"});
  expect_error([] { open_device(Kind::kMetal, {}); }, {"this build has no metal", "--device cpu"});
}

TEST_CASE("barriers lie where one needs what another wrote, and nowhere else") {
  KernelCode kernel_code;
  kernel_code.buffers = 2;
  kernel_code.writes = {1};
  const Kernel kernel(kernel_code);
  const PlainBuffer first, second;
  const auto bind = [&](const View& from, const View& to) {
    const View views[] = {from, to};
    return std::make_unique<Bindings>(kernel, views);
  };
  const View a{&first, 0, 64}, b{&first, 64, 64}, c{&second, 0, 64}, d{&second, 60, 8};
  const auto ab = bind(a, b), ac = bind(a, c), bc = bind(b, c), ca = bind(c, a), bd = bind(b, d);
  const auto count = [](std::vector<const Bindings*> order) {
    CountingStream stream;
    Recorder recorder(stream);
    for (const Bindings* bindings : order) recorder.dispatch(*bindings, {}, {1, 1, 1});
    return stream.barriers;
  };
  CHECK(count({ab.get(), ac.get()}) == 0);            // both read a
  CHECK(count({ab.get(), bc.get()}) == 1);            // reads what was written
  CHECK(count({ab.get(), ab.get()}) == 1);            // writes it again
  CHECK(count({bc.get(), ca.get(), ab.get()}) == 2);  // c, then a
  CHECK(count({ac.get(), ab.get(), bd.get()}) == 1);  // d overlaps c, and b was written
  CHECK(count({ac.get(), bd.get()}) == 1);            // by four bytes
  CHECK(count({ab.get(), bc.get(), ac.get()}) == 2);  // the write of c is not forgotten by the first barrier
  CountingStream stream;
  Recorder recorder(stream);
  recorder.finish();
  CHECK(stream.waits == 0);
  recorder.dispatch(*ab, {}, {1, 1, 1});
  recorder.submit();
  recorder.dispatch(*bc, {}, {1, 1, 1});
  CHECK(stream.barriers == 1);  // also across submissions
  recorder.finish();
  recorder.dispatch(*ca, {}, {1, 1, 1});
  CHECK(stream.barriers == 1);  // but not once all has ended
  recorder.copy(a, c);
  CHECK(stream.barriers == 2);
}

TEST_CASE("cache files are whole or nothing") {
  const test::TempDir directory;
  const Variable variable("CFMOE_CACHE_DIR", directory.path() + "/a/b");
  const KernelCache cache("test", "a device");
  CHECK(cache.load().empty());
  cache.store("compiled");
  CHECK(cache.load() == "compiled");
  CHECK(KernelCache("test", "another").load().empty());
  test::flip_bit(cache.path(), 35);
  CHECK(cache.load().empty());
  cache.store("");
  CHECK(cache.load().empty());
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory.path() + "/a/b")) ++files;
  CHECK(files == 1);
}

TEST_CASE("pieces lie aligned, in as few blocks as fit") {
  const uint64_t sizes[] = {100, 512, 1, 600};
  const BlockLayout one = lay_out(sizes, 512, 1 << 20);
  CHECK(one.blocks == std::vector<uint64_t>{512 + 512 + 512 + 1024});
  CHECK(one.pieces[3].offset == 1536);
  const BlockLayout many = lay_out(sizes, 512, 1024);
  CHECK(many.blocks == std::vector<uint64_t>{1024, 512, 1024});
  CHECK(many.pieces[2].block == 1);
  CHECK(many.total() == 2560);
  expect_error([&] { lay_out(sizes, 512, 512); }, {"600 bytes", "512 bytes", "--device cpu"});
}

}  // namespace cfmoe::device
