// Decode kernels of one expert and of several in one submission, by the device's own clock, beside a copy from device
// memory to device memory: by the driver's copy command and by a kernel, of which the faster counts. Experts are drawn
// anew for each repetition out of more memory than caches hold.
#include "kernel_bench.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <utility>

#include "artifact/artifact_files.h"
#include "copy_kernel.h"
#include "device/device.h"
#include "device/recorder.h"
#include "engine/device_experts.h"
#include "engine/device_memory.h"
#include "engine/device_program.h"
#include "engine/model_memory.h"
#include "engine/placement.h"
#include "engine/plan.h"
#include "error.h"
#include "json_writer.h"
#include "numbers.h"
#include "store/aligned_buffer.h"
#include "store/expert_store.h"

namespace cfmoe::tools {
namespace {

constexpr int32_t kEntryInts = 4;
constexpr uint64_t kCopyBytes = uint64_t{512} << 20;
constexpr uint32_t kCopyGroups = 32768;

struct Options {
  std::string artifact, device = "vulkan";
  std::vector<int32_t> experts;  // per submission; empty: 1 and top_k
  int32_t rounds = 9, repeat = 24;
  uint64_t slab_bytes = uint64_t{2} << 30;
  bool json = false;
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--json") {
      options.json = true;
      continue;
    }
    if (!name.starts_with("--")) {
      if (!options.artifact.empty()) throw Error(name + ": one artifact at a time");
      options.artifact = name;
      continue;
    }
    if (i + 1 == arguments.size()) throw Error(name + " needs a value, or is unknown");
    const std::string& value = arguments[++i];
    if (name == "--device") {
      options.device = value;
    } else if (name == "--experts") {
      for (size_t begin = 0; begin <= value.size();) {
        const size_t end = std::min(value.find(',', begin), value.size());
        options.experts.push_back(number<int32_t>(name, value.substr(begin, end - begin), 1, 256));
        begin = end + 1;
      }
    } else if (name == "--rounds") {
      options.rounds = number<int32_t>(name, value, 1, 1000);
    } else if (name == "--repeat") {
      options.repeat = number<int32_t>(name, value, 1, 1000);
    } else if (name == "--slab-mib") {
      options.slab_bytes = number<uint64_t>(name, value, 1, 4095) << 20;
    } else {
      throw Error(name + " is unknown: see cfmoe-engine --help");
    }
  }
  if (options.artifact.empty()) throw Error("bench-kernels needs the artifact's directory");
  return options;
}

struct Spread {
  std::vector<double> values;
  double median() const {
    std::vector<double> sorted = values;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
  std::string json(double scale) const {
    const auto [least, most] = std::minmax_element(values.begin(), values.end());
    JsonObject out;
    out.add("median", median() * scale).add("min", *least * scale).add("max", *most * scale);
    return out.str();
  }
};

struct Result {
  int32_t experts;
  Spread seconds, gate_up, down;  // of one submission's work
};

class KernelBench {
 public:
  explicit KernelBench(const Options& options)
      : options_(options),
        artifact_(open_artifact(options.artifact)),
        placement_(place({options.device, "", ""}, artifact_)),
        device_(*checked(placement_)),
        plan_(parse_plan(read_verified(artifact_.directory, artifact_.manifest, placement_.gpu->plan),
                         artifact_.path_of(placement_.gpu->plan), artifact_.manifest, artifact_.index, true)),
        kernels_(device_, plan_, read_verified(artifact_.directory, artifact_.manifest, placement_.gpu->library)),
        stream_(device_.make_stream()) {
    if (options_.experts.empty()) options_.experts = {1, artifact_.manifest.model.top_k};
    most_ = *std::max_element(options_.experts.begin(), options_.experts.end());
    reserve();
    fill_slab();
    fill_activation();
    draw_experts();
    bind();
  }

  void run() {
    for (const int32_t experts : options_.experts) results_.push_back({experts, {}, {}, {}});
    // The clocks of a device that was idle take a while to rise.
    for (int i = 0; i < 3; ++i) copy_seconds(true);
    for (Result& result : results_) measure(result, false);
    for (int32_t round = 0; round < options_.rounds; ++round) {
      copy_.values.push_back(copy_seconds(true));
      driver_copy_.values.push_back(copy_seconds(false));
      for (Result& result : results_) measure(result, true);
    }
  }

  void print() const {
    const ModelFacts& model = artifact_.manifest.model;
    const ExpertIndex& index = artifact_.index.experts;
    const double copied = 2.0 * static_cast<double>(copy_bytes_);
    const double rate = copied / std::min(copy_.median(), driver_copy_.median());
    std::string rows;
    if (!options_.json) {
      std::printf("%s: %s, experts %d x %d, %s, %.2f MB each; copy %.1f GB/s (read and written)\n",
                  device_.facts().name.c_str(), placement_.gpu->name.c_str(), model.hidden_size, model.expert_ffn_size,
                  index.format.c_str(), static_cast<double>(index.record_bytes) * 1e-6, rate * 1e-9);
      std::printf("experts   gate_up us   down us   both us      GB/s   of copy\n");
    }
    for (const Result& result : results_) {
      const double bytes = static_cast<double>(index.record_bytes) * result.experts;
      const double speed = bytes / result.seconds.median();
      if (!options_.json) {
        std::printf("%7d %12.2f %9.2f %9.2f %9.1f %9.3f\n", result.experts, result.gate_up.median() * 1e6,
                    result.down.median() * 1e6, result.seconds.median() * 1e6, speed * 1e-9, speed / rate);
      }
      JsonObject row;
      row.add("experts", result.experts)
          .raw("microseconds", result.seconds.json(1e6))
          .raw("gate_up_microseconds", result.gate_up.json(1e6))
          .raw("down_microseconds", result.down.json(1e6))
          .add("bytes", bytes)
          .add("gb_per_s", speed * 1e-9)
          .add("of_copy", speed / rate);
      rows += (rows.empty() ? "" : ", ") + row.str();
    }
    if (!options_.json) return;
    JsonObject out;
    out.add("device", device_.facts().name)
        .add("driver", device_.facts().driver)
        .add("target", placement_.gpu->name)
        .add("hidden_size", model.hidden_size)
        .add("expert_ffn_size", model.expert_ffn_size)
        .add("format", index.format)
        .add("record_bytes", index.record_bytes)
        .add("slots", slots_)
        .add("rounds", options_.rounds)
        .add("repeat", options_.repeat)
        .add("copy_gb_per_s", rate * 1e-9)
        .add("copy_bytes", copy_bytes_)
        .raw("kernel_copy_seconds", copy_.json(1))
        .raw("driver_copy_seconds", driver_copy_.json(1))
        .raw("results", "[" + rows + "]");
    std::printf("%s\n", out.str().c_str());
  }

 private:
  static device::Device* checked(const Placement& placement) {
    if (!placement.device) throw Error("bench-kernels measures GPUs: give --device vulkan or opencl");
    return placement.device.get();
  }

  device::View take(uint64_t bytes) {
    buffers_.push_back(device_.allocate((bytes + 511) / 512 * 512, device::Memory::kModel));
    Uploader(device_).clear(*buffers_.back());
    return {buffers_.back().get(), 0, buffers_.back()->size()};
  }

  // Buffers as the decode program has them, but for as many experts as are asked for.
  void reserve() {
    const PlanStep* step = nullptr;
    for (const PlanStep& candidate : plan_.decode.steps) {
      if (candidate.op == StepOp::kExperts) step = &candidate;
    }
    if (step == nullptr) throw Error("plan.json: its decode program computes no experts; compile the artifact again");
    const auto bytes = [&](int32_t buffer, int64_t factor) {
      const PlanBuffer& plan = plan_.decode.buffers[buffer];
      return tensor_bytes(plan.dtype, plan.shape, {1, 0, plan_.bounds.context.low}) * static_cast<uint64_t>(factor);
    };
    quantised_ = plan_.decode.buffers[step->activation].dtype == DType::kInt32;
    const int32_t share = std::max(1, (most_ + artifact_.manifest.model.top_k - 1) / artifact_.manifest.model.top_k);
    activation_ = take(bytes(step->activation, 1));
    scratch_ = take(bytes(step->scratch, share));
    rows_ = take(bytes(step->rows, share));
    lists_ = take(sizeof(int32_t) * static_cast<uint64_t>(most_));
    zeros_ = take(sizeof(int32_t) * static_cast<uint64_t>(most_));
    const uint64_t stride = artifact_.index.experts.record_stride;
    const device::Facts& facts = device_.facts();
    const uint64_t cap = std::min({options_.slab_bytes, facts.max_binding_bytes, facts.max_buffer_bytes});
    slots_ = static_cast<int32_t>(std::max<uint64_t>(cap / stride, 1));
    if (stride > facts.max_binding_bytes) throw Error("one expert does not fit the device's largest buffer");
    slab_ = device_.allocate(static_cast<uint64_t>(slots_) * stride, device::Memory::kModel);
    copy_bytes_ = std::min<uint64_t>(kCopyBytes, slab_->size() / 2 / 512 * 512);
    copy_to_ = device_.allocate(copy_bytes_, device::Memory::kModel);
  }

  // The artifact's records one after the other, again and again.
  void fill_slab() {
    const ExpertIndex& index = artifact_.index.experts;
    const std::unique_ptr<ExpertStore> store =
        open_expert_store(artifact_.path_of("experts.bin"), index, IoMode::kBuffered);
    const AlignedBuffer record(index.record_stride);
    Uploader uploader(device_);
    for (int32_t slot = 0; slot < slots_; ++slot) {
      const int32_t id = slot % (index.layers * index.experts);
      store->read({id / index.experts, id % index.experts}, record.data());
      uploader.write({slab_.get(), static_cast<uint64_t>(slot) * index.record_stride, index.record_stride},
                     record.data());
    }
  }

  // Groups of 32 codes with a scale and the codes' sum, or plain numbers: docs/artifact-format.md.
  void fill_activation() {
    std::mt19937 random(1);
    std::vector<uint32_t> words(activation_.size / 4);
    if (quantised_) {
      constexpr size_t kGroup = 10;
      const float scale = 0.01F;
      for (size_t group = 0; group + kGroup <= words.size(); group += kGroup) {
        int32_t sum = 0;
        for (size_t i = 0; i < 32; ++i) {
          const auto code = static_cast<int32_t>(random() % 255) - 127;
          sum += code;
          words[group + i / 4] |= (static_cast<uint32_t>(code) & 0xff) << (i % 4 * 8);
        }
        std::memcpy(&words[group + 8], &scale, sizeof(scale));
        std::memcpy(&words[group + 9], &sum, sizeof(sum));
      }
    } else {
      for (uint32_t& word : words) {
        const float value = static_cast<float>(random() % 2048) / 1024.0F - 1.0F;
        std::memcpy(&word, &value, sizeof(value));
      }
    }
    Uploader uploader(device_);
    uploader.write(activation_, reinterpret_cast<const std::byte*>(words.data()));
    std::vector<int32_t> rows(lists_.size / 4);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int32_t>(i);
    uploader.write(lists_, reinterpret_cast<const std::byte*>(rows.data()));
  }

  // One set of distinct experts for each repetition.
  void draw_experts() {
    std::mt19937 random(2);
    std::vector<int32_t> order(static_cast<size_t>(slots_));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::vector<int32_t> entries;
    size_t next = order.size();
    for (int32_t set = 0; set < options_.repeat; ++set) {
      for (int32_t i = 0; i < most_; ++i) {
        if (next >= order.size()) {
          std::shuffle(order.begin(), order.end(), random);
          next = 0;
        }
        const auto words = static_cast<int64_t>(artifact_.index.experts.record_stride / 4);
        const int32_t entry[kEntryInts] = {static_cast<int32_t>(order[next++] * words), i, 1, i};
        entries.insert(entries.end(), entry, entry + kEntryInts);
      }
    }
    work_ = take(entries.size() * sizeof(int32_t));
    entries.resize(work_.size / sizeof(int32_t));
    Uploader(device_).write(work_, reinterpret_cast<const std::byte*>(entries.data()));
  }

  void bind() {
    gate_up_ = kernels_.get(plan_.experts.gate_up.decode);
    down_ = kernels_.get(plan_.experts.down.decode);
    const device::View slots{slab_.get(), 0, slab_->size()};
    const device::View gate_up[] = {activation_, zeros_, slots, scratch_, work_};
    const device::View down[] = {scratch_, lists_, slots, rows_, work_};
    bound_gate_up_ = device_.bind(*gate_up_.kernel, gate_up);
    bound_down_ = device_.bind(*down_.kernel, down);
    const bool opencl = device_.facts().kind == device::Kind::kOpenCl;
    const std::string_view library =
        opencl ? std::string_view(kCopyOpenCl)
               : std::string_view(reinterpret_cast<const char*>(kCopySpirv), sizeof(kCopySpirv));
    device::KernelCode code;
    code.name = "copy";
    code.entry = opencl ? "copy" : "main";
    code.bytes = library.size();
    code.local = {256, 1, 1};
    code.buffers = 2;
    code.scalars = 1;
    code.writes = {1};
    copy_kernel_ = device_.load(library, {&code, 1}, 0);
    const device::View copy[] = {{slab_.get(), 0, copy_bytes_}, {copy_to_.get(), 0, copy_bytes_}};
    bound_copy_ = device_.bind(*copy_kernel_[0], copy);
  }

  double copy_seconds(bool kernel) {
    const auto vectors = static_cast<int32_t>(copy_bytes_ / 16);
    stream_->mark();
    if (kernel) {
      stream_->dispatch(*bound_copy_, {&vectors, 1}, {kCopyGroups, 1, 1});
    } else {
      stream_->copy({slab_.get(), 0, copy_bytes_}, {copy_to_.get(), 0, copy_bytes_});
    }
    stream_->mark();
    return elapsed()[0];
  }

  std::vector<double> elapsed() {
    stream_->submit();
    stream_->wait();
    const std::vector<double> marks = stream_->marks();
    std::vector<double> out;
    for (size_t i = 1; i < marks.size(); ++i) out.push_back(marks[i] - marks[i - 1]);
    return out;
  }

  // Both kernels alternate, as they do in a model: each waits for the other. The parts are measured by themselves too.
  void measure(Result& result, bool keep) {
    device::Recorder recorder(*stream_);
    for (const int part : {0, 1, 2}) {
      stream_->mark();
      for (int32_t set = 0; set < options_.repeat; ++set) {
        const int32_t scalars[] = {set * most_, result.experts, 1};
        std::array<uint32_t, 3> groups;
        if (part != 2 && grid_of(*gate_up_.plan, scalars, &groups)) recorder.dispatch(*bound_gate_up_, scalars, groups);
        if (part != 1 && grid_of(*down_.plan, scalars, &groups)) recorder.dispatch(*bound_down_, scalars, groups);
      }
      stream_->mark();
      const double seconds = elapsed()[0] / options_.repeat;
      if (keep) (part == 0 ? result.seconds : part == 1 ? result.gate_up : result.down).values.push_back(seconds);
    }
  }

  Options options_;
  Artifact artifact_;
  Placement placement_;
  device::Device& device_;
  Plan plan_;
  DeviceKernels kernels_;
  std::unique_ptr<device::Stream> stream_;
  std::vector<std::unique_ptr<device::Buffer>> buffers_;
  std::unique_ptr<device::Buffer> slab_, copy_to_;
  device::View activation_, scratch_, rows_, lists_, zeros_, work_;
  std::vector<std::unique_ptr<device::Kernel>> copy_kernel_;
  std::unique_ptr<device::Bindings> bound_gate_up_, bound_down_, bound_copy_;
  DeviceKernel gate_up_, down_;
  bool quantised_ = false;
  int32_t most_ = 1, slots_ = 0;
  uint64_t copy_bytes_ = 0;
  Spread copy_, driver_copy_;
  std::vector<Result> results_;
};

}  // namespace

int bench_kernels(const std::vector<std::string>& arguments) {
  try {
    KernelBench bench(parse(arguments));
    bench.run();
    bench.print();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}

}  // namespace cfmoe::tools
