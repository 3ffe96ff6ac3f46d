// Calls the C API in any order with any arguments that its header allows, and some that it does not: handles that are
// NULL, numbers at the edges, calls from token callbacks and other threads. Every call must return a status and one
// line, memory must stay within the budget, and the same conversation must give the same tokens throughout.
//   cfmoe_fuzz_capi [RUNS] [SEED]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cfmoe/cfmoe.h"
#include "tokenizer_fixture.h"
#include "toy_artifact.h"

namespace {

class Fuzzer {
 public:
  Fuzzer(uint64_t seed, std::string artifact) : random_(seed), artifact_(std::move(artifact)) {}
  ~Fuzzer() { close(); }

  void step() {
    switch (below(15)) {
      case 0: reopen(); break;
      case 1: set_budget(); break;
      case 2: check(cfmoe_engine_trim(maybe(engine_), edge(), error_, error_size())); break;
      case 3: check(cfmoe_session_reset(maybe(session_), error_, error_size())); break;
      case 4: feed(); break;
      case 5: second_session(); break;
      case 6: tokenizer(); break;
      case 7: cfmoe_session_cancel(maybe(session_)); break;
      case 8: look(); break;
      case 9:
        check(cfmoe_session_write_trace(session_, below(2) == 0 ? nullptr : "/nowhere/x", error_, error_size()));
        break;
      case 10: conversation(); break;
      case 11: check(cfmoe_session_rewind(maybe(session_), below(100), error_, error_size())); break;
      default: generate(); break;
    }
  }

 private:
  [[noreturn]] static void broken(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::abort();
  }
  size_t below(size_t end) { return std::uniform_int_distribution<size_t>(0, end - 1)(random_); }
  template <typename T>
  T* maybe(T* handle) {
    return below(20) == 0 ? nullptr : handle;
  }
  uint64_t edge() {
    static constexpr uint64_t kEdges[] = {0, 1, 4096, 1 << 20, uint64_t{1} << 31, uint64_t{1} << 63, ~uint64_t{0}};
    if (engine_ == nullptr || below(2) == 0) return kEdges[below(std::size(kEdges))];
    cfmoe_memory memory = {};
    cfmoe_engine_memory(engine_, &memory);
    return memory.smallest_budget_bytes + below(memory.largest_budget_bytes - memory.smallest_budget_bytes + 9) - 4;
  }
  size_t error_size() {
    std::memset(error_, 'x', sizeof(error_));
    return error_size_ = below(3) == 0 ? below(4) : sizeof(error_);
  }
  cfmoe_status check(cfmoe_status status) {
    if (status < CFMOE_OK || status > CFMOE_CANCELLED) broken("an unknown status");
    if (status == CFMOE_INTERNAL) broken(std::string("an internal fault: ") + error_);
    if (status != CFMOE_OK && error_size_ > 0) {
      const size_t length = strnlen(error_, error_size_);
      if (length == error_size_) broken("a message without an end");
      if (error_size_ > 8 && length == 0) broken("no message");
      if (std::memchr(error_, '\n', length) != nullptr) broken("a message of several lines");
    }
    return status;
  }

  void close() {
    cfmoe_session_destroy(std::exchange(session_, nullptr));
    cfmoe_engine_close(std::exchange(engine_, nullptr));
  }
  void reopen() {
    close();
    static constexpr const char* kIo[] = {nullptr, "auto", "buffered", "mmap", "direct", "tape", ""};
    static constexpr const char* kPolicies[] = {nullptr, "lru", "lfu", "s3fifo", "gate", "learned", "opt", "\n"};
    cfmoe_engine_options options;
    cfmoe_engine_options_init(&options);
    if (below(30) == 0) options.struct_size = static_cast<uint32_t>(below(100));
    if (below(2) == 0) options.budget_bytes = edge();
    static constexpr double kPercent[] = {0, 34, 50, 100, -1, 1e300, std::numeric_limits<double>::quiet_NaN()};
    options.expert_percent = kPercent[below(below(4) == 0 ? 7 : 4)];
    options.context_size = static_cast<uint32_t>(below(3) == 0 ? edge() : below(129));
    options.threads = static_cast<int32_t>(below(8) == 0 ? edge() : 1 + below(3));
    options.io = kIo[below(below(4) == 0 ? 7 : 4)];
    options.policy = kPolicies[below(below(4) == 0 ? 8 : 6)];
    options.log_events = static_cast<int32_t>(below(2));
    options.record_trace = static_cast<int32_t>(below(3) == 0);
    const char* path = below(20) == 0 ? nullptr : below(20) == 0 ? "/dev/null" : artifact_.c_str();
    const auto status =
        check(cfmoe_engine_open(path, below(10) == 0 ? nullptr : &options, &engine_, error_, error_size()));
    if ((status == CFMOE_OK) != (engine_ != nullptr)) broken("a status that does not fit the handle");
    // Mostly there is something to work with.
    if (engine_ == nullptr && below(8) > 0) {
      cfmoe_engine_options_init(&options);
      options.expert_percent = static_cast<double>(34 + below(67));
      options.threads = static_cast<int32_t>(1 + below(3));
      if (check(cfmoe_engine_open(artifact_.c_str(), &options, &engine_, error_, error_size())) != CFMOE_OK)
        broken(error_);
    }
    if (engine_ != nullptr) check(cfmoe_session_create(engine_, &session_, error_, error_size()));
  }
  void set_budget() {
    const double percent = below(2) == 0 ? 0.0 : static_cast<double>(below(120));
    check(cfmoe_engine_set_budget(maybe(engine_), percent > 0 ? 0 : edge(), percent, error_, error_size()));
  }
  void look() {
    cfmoe_metrics metrics;
    cfmoe_model_info model;
    cfmoe_session_metrics(maybe(session_), below(9) == 0 ? nullptr : &metrics);
    cfmoe_engine_model(maybe(engine_), &model);
    std::vector<uint8_t> residents(below(10));
    const size_t total = cfmoe_engine_residents(maybe(engine_), residents.data(), residents.size());
    if (total != 0 && total != 6) broken("a wrong number of experts");
    std::vector<cfmoe_access_event> events(below(50));
    cfmoe_session_take_events(maybe(session_), events.data(), events.size());
    for (const char* text : {cfmoe_engine_io(engine_), cfmoe_engine_policy(engine_), cfmoe_engine_warning(engine_)}) {
      if (text == nullptr) broken("a text is NULL");
    }
    check_memory(engine_);
  }
  static void check_memory(const cfmoe_engine* engine) {
    if (engine == nullptr) return;
    cfmoe_memory m = {};
    cfmoe_engine_memory(engine, &m);
    if (m.weights_bytes + m.kv_bytes + m.workspace_bytes + m.pool_bytes > m.budget_bytes)
      broken("more memory than the budget");
  }
  std::vector<int32_t> tokens() {
    std::vector<int32_t> out(below(8) == 0 ? below(200) : 1 + below(20));
    for (int32_t& token : out) token = static_cast<int32_t>(below(100));
    if (!out.empty() && below(12) == 0) out[below(out.size())] = static_cast<int32_t>(edge());
    return out;
  }
  void feed() {
    const std::vector<int32_t> prompt = tokens();
    std::vector<float> logits(prompt.size() * 100);
    check(cfmoe_session_feed(maybe(session_), prompt.data(), static_cast<uint32_t>(prompt.size()),
                             static_cast<int>(below(2)), below(2) == 0 ? nullptr : logits.data(), error_,
                             error_size()));
  }
  void second_session() {
    cfmoe_session* second = nullptr;
    const auto status = check(cfmoe_session_create(maybe(engine_), &second, error_, error_size()));
    if (status == CFMOE_OK && session_ != nullptr) broken("two sessions of one engine");
    cfmoe_session_destroy(second);
  }

  // What a token callback, or another thread, does meanwhile.
  static int on_token(int32_t token, void* user) {
    auto* self = static_cast<Fuzzer*>(user);
    if (token < 0 || token >= 100) broken("a token outside the vocabulary");
    switch (self->below(12)) {
      case 0: self->set_budget(); break;
      case 1: self->check(cfmoe_engine_trim(self->engine_, self->edge(), self->error_, self->error_size())); break;
      case 2: self->look(); break;
      case 3: cfmoe_session_cancel(self->session_); break;
      case 4:
        if (self->check(cfmoe_session_reset(self->session_, self->error_, self->error_size())) == CFMOE_OK)
          broken("a reset inside a call");
        break;
      case 5: return static_cast<int>(self->below(4) == 0);
      default: break;
    }
    return 0;
  }
  void generate() {
    const std::vector<int32_t> prompt = tokens(), stops = tokens();
    cfmoe_sampling sampling;
    cfmoe_sampling_init(&sampling);
    if (below(2) == 0) sampling.temperature = static_cast<float>(below(30)) * 0.1F;
    if (below(3) == 0) sampling.top_k = static_cast<int32_t>(below(4) == 0 ? edge() : below(50));
    if (below(3) == 0) sampling.top_p = static_cast<float>(below(14)) * 0.1F;
    if (below(3) == 0) sampling.repetition_penalty = static_cast<float>(below(30)) * 0.1F;
    sampling.seed = edge();
    const auto most = static_cast<uint32_t>(below(6) == 0 ? 200 : below(20));
    std::vector<int32_t> out(most);
    uint32_t count = 77;
    std::atomic<bool> done{false};
    std::thread other;
    if (engine_ != nullptr && below(4) == 0) {
      other = std::thread([this, &done, budget = edge()] {
        char error[64];
        while (!done) {
          if (cfmoe_engine_trim(engine_, budget, error, sizeof(error)) != CFMOE_OK) broken(error);
          check_memory(engine_);
          std::this_thread::yield();
        }
      });
    }
    // Callbacks use the same buffer.
    const size_t size = error_size();
    const auto status = cfmoe_session_generate(
        maybe(session_), prompt.data(), static_cast<uint32_t>(prompt.size()), most, below(4) == 0 ? nullptr : &sampling,
        below(2) == 0 ? nullptr : stops.data(), static_cast<uint32_t>(stops.size()), below(4) == 0 ? nullptr : on_token,
        this, below(4) == 0 ? nullptr : out.data(), &count, error_, size);
    error_size_ = size;
    check(status);
    done = true;
    if (other.joinable()) other.join();
    if (count > most) broken("more tokens than were asked for");
  }
  // Greedy, from the beginning: always the same.
  void conversation() {
    if (session_ == nullptr) return;
    cfmoe_model_info model = {};
    cfmoe_engine_model(engine_, &model);
    check(cfmoe_session_reset(session_, error_, error_size()));
    const auto length = static_cast<uint32_t>(1 + below(16));
    std::vector<int32_t> prompt(length), out(10);
    for (uint32_t i = 0; i < length; ++i) prompt[i] = static_cast<int32_t>((i * 37 + 11) % 100);
    uint32_t count = 0;
    const int32_t none = 0;
    const auto callback = [](int32_t, void* user) {
      auto* self = static_cast<Fuzzer*>(user);
      if (self->below(3) == 0) self->set_budget();
      return 0;
    };
    const size_t size = error_size();
    const auto status = cfmoe_session_generate(session_, prompt.data(), length, 10, nullptr, &none, 0, callback, this,
                                               out.data(), &count, error_, size);
    error_size_ = size;
    check(status);
    if (status != CFMOE_OK || count < 10) return;  // a small context
    const auto [known, fresh] = expected_.try_emplace(length, out);
    if (!fresh && known->second != out) broken("a conversation gave other tokens");
  }
  void tokenizer() {
    cfmoe_tokenizer* tokenizer = nullptr;
    const auto status =
        check(cfmoe_tokenizer_open(below(9) == 0 ? nullptr : artifact_.c_str(), &tokenizer, error_, error_size()));
    if ((status == CFMOE_OK) != (tokenizer != nullptr)) broken("a status that does not fit the tokenizer");
    std::string text;
    for (size_t left = below(60); left > 0; --left)
      text.push_back(static_cast<char>(below(3) == 0 ? below(256) : below(128)));
    std::vector<int32_t> ids(below(80));
    size_t count = 0;
    const auto encoded = check(cfmoe_tokenizer_encode(maybe(tokenizer), text.data(), text.size(), ids.data(),
                                                      ids.size(), &count, error_, error_size()));
    if (encoded == CFMOE_OK && tokenizer != nullptr && count <= ids.size()) {
      std::string back;
      char piece[64];
      size_t size = 0;
      for (size_t i = 0; i <= count; ++i) {
        check(cfmoe_tokenizer_push(tokenizer, i < count ? ids[i] : -1, piece, sizeof(piece), &size, error_,
                                   error_size()));
        back.append(piece, size);
      }
      if (text.find("<|end|>") == std::string::npos && back != text) broken("other text came back");
    }
    const size_t plain[] = {below(70), below(70), below(70), below(70)};
    check(cfmoe_tokenizer_encode_typed(maybe(tokenizer), text.data(), text.size(), below(9) == 0 ? nullptr : plain,
                                       below(3), ids.data(), ids.size(), &count, error_, error_size()));
    cfmoe_tokenizer_push(maybe(tokenizer), static_cast<int32_t>(edge()), error_, below(8), &count, nullptr, 0);
    cfmoe_tokenizer_close(tokenizer);
  }

  std::mt19937_64 random_;
  std::string artifact_;
  cfmoe_engine* engine_ = nullptr;
  cfmoe_session* session_ = nullptr;
  char error_[512];
  size_t error_size_ = 0;
  std::map<uint32_t, std::vector<int32_t>> expected_;
};

}  // namespace

int main(int argc, char** argv) {
  const long runs = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 2000;
  const unsigned long long seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const cfmoe::test::ToyArtifact artifact(cfmoe::test::plan_text(), cfmoe::test::tokenizer_text());
  Fuzzer fuzzer(seed, artifact.path());
  for (long run = 0; run < runs; ++run) fuzzer.step();
  std::printf("C API: %ld calls, seed %llu\n", runs, seed);
  return 0;
}
