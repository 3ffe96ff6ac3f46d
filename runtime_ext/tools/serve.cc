// Two threads: one reads requests, the other works them off in order. What must not wait for a generation to end
// (cancel, trim) the reader does itself; metrics and budgets are served between two tokens.
#include "serve.h"

#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "artifact/json_reader.h"
#include "cfmoe/cfmoe.h"
#include "cfmoe/simulate.h"
#include "error.h"
#include "json_writer.h"
#include "line_reader.h"
#include "report.h"

namespace cfmoe::tools {
namespace {

constexpr int kProtocolVersion = 1;
constexpr size_t kMaxPrompt = size_t{4} << 20, kMaxTokens = size_t{1} << 20, kMaxPieces = 10000;
constexpr size_t kErrorBytes = 2048, kTextBytes = size_t{64} << 10;
constexpr uint32_t kDefaultNewTokens = 256;

struct Request {
  std::string id = "null";  // as JSON
  std::string op;
  std::optional<JsonValue> body;
  uint64_t number = 0;
};

// Lets the C API write its message, then throws it.
class Call {
 public:
  char* error() { return error_; }
  static constexpr size_t size() { return kErrorBytes; }
  void check(cfmoe_status status) const {
    if (status != CFMOE_OK) throw Error(status == CFMOE_USER ? ErrorKind::kUser : ErrorKind::kInternal, error_);
  }

 private:
  char error_[kErrorBytes] = "";
};

class Server {
 public:
  Server(int in, std::FILE* out) : reader_(in), out_(out) {}
  ~Server() { unload(); }

  int run() {
    JsonObject ready;
    ready.add("event", "ready")
        .add("protocol", kProtocolVersion)
        .add("version", cfmoe_version())
        .add("abi", cfmoe_abi_version())
        .add("policies", cfmoe_engine_policies());
    send(ready);
    std::thread worker([this] { work(); });
    read_requests();
    worker.join();
    return 0;
  }

 private:
  // The reader's side.
  void read_requests();
  void accept(const std::string& line);
  void enqueue(Request request);
  // The worker's side.
  void work();
  void handle(const Request& request);
  void load(const Request& request);
  void unload();
  void generate(const Request& request);
  void set_budget(const Request& request);
  void report_metrics(const Request& request);
  void report_devices(const Request& request);
  int on_token(const Request& request, int32_t token);
  std::vector<int32_t> prompt_of(const JsonValue& body) const;
  std::string text_of(int32_t token);
  cfmoe_engine* engine() const;
  bool cancelled(const Request& request) const { return request.number <= cancelled_through_ || broken_; }

  void send(const JsonObject& event);
  void reply(const Request& request, const char* event, JsonObject fields = {}) {
    JsonObject out;
    out.raw("id", request.id).add("event", event);
    send(out.merge(fields));
  }
  void fail(const std::string& id, const char* kind, const std::string& message) {
    JsonObject out;
    send(out.raw("id", id).add("event", "error").add("kind", kind).add("message", message));
  }

  LineReader reader_;
  std::FILE* out_;
  std::mutex out_mutex_, queue_mutex_;
  std::condition_variable arrived_;
  std::deque<Request> queue_;
  bool ended_ = false;
  std::atomic<bool> broken_{false};  // nobody reads what is sent
  uint64_t accepted_ = 0;
  std::atomic<uint64_t> cancelled_through_{0};  // number of the last request that a cancel meant

  mutable std::mutex handles_mutex_;  // the reader may use the handles while the worker runs, not while it closes them
  cfmoe_engine* engine_ = nullptr;
  cfmoe_session* session_ = nullptr;
  cfmoe_tokenizer* tokenizer_ = nullptr;
  std::string failure_;  // of a token callback
};

void Server::send(const JsonObject& event) {
  const std::string line = event.str() + "\n";
  const std::lock_guard lock(out_mutex_);
  if (std::fwrite(line.data(), 1, line.size(), out_) != line.size() || std::fflush(out_) != 0) broken_ = true;
}

void check_fields(const JsonValue& body, std::initializer_list<const char*> known) {
  for (const std::string& name : body.keys()) {
    const bool common = name == "id" || name == "op";
    if (!common && std::find(known.begin(), known.end(), name) == known.end())
      throw Error("request: the field " + json_string(name) + " is unknown");
  }
}

std::optional<JsonValue> given(const JsonValue& body, const char* name) {
  std::optional<JsonValue> value = body.find(name);
  if (value && value->is_null()) return std::nullopt;
  return value;
}

// False where it is not given.
bool flag(const JsonValue& body, const char* name) {
  const std::optional<JsonValue> value = given(body, name);
  return value && value->boolean();
}

uint32_t small_number(const JsonValue& body, const char* name, uint32_t otherwise) {
  const std::optional<JsonValue> value = given(body, name);
  return value ? static_cast<uint32_t>(value->int32(0)) : otherwise;
}

float fraction(const JsonValue& body, const char* name, float otherwise) {
  const std::optional<JsonValue> value = given(body, name);
  return value ? static_cast<float>(value->number(-1e30, 1e30)) : otherwise;
}

// "memory_budget" in bytes, or "expert_percent"; neither: all experts as far as memory goes.
std::pair<uint64_t, double> budget_of(const JsonValue& body) {
  const std::optional<JsonValue> bytes = given(body, "memory_budget"), percent = given(body, "expert_percent");
  if (bytes && percent) throw Error("request: give memory_budget or expert_percent, not both");
  return {bytes ? static_cast<uint64_t>(bytes->integer(1, std::numeric_limits<int64_t>::max())) : 0,
          percent ? percent->number(1e-9, 100) : 0};
}

// In bytes; 0, the least that works, where a trim names none.
uint64_t trim_budget(const JsonValue& body) {
  const std::optional<JsonValue> bytes = given(body, "memory_budget");
  return bytes ? bytes->size_value() : 0;
}

void Server::read_requests() {
  std::string line;
  bool too_long = false;
  while (!broken_ && reader_.next(&line, &too_long)) {
    if (too_long) {
      fail("null", "protocol", "request: the line has more than " + std::to_string(LineReader::kMaxLine) + " bytes");
      continue;
    }
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    accept(line);
    if (ended_) return;
  }
  const std::lock_guard lock(queue_mutex_);
  ended_ = true;
  arrived_.notify_all();
}

void Server::accept(const std::string& line) {
  Request request;
  try {
    request.body = JsonValue::parse(line, "request", "", {LineReader::kMaxLine, 32});
    if (const std::optional<JsonValue> id = given(*request.body, "id")) {
      request.id = id->is_integer() ? std::to_string(id->integer(INT64_MIN, INT64_MAX)) : json_string(id->text(256));
    }
    request.op = request.body->at("op").choice(
        {"load", "generate", "cancel", "set_budget", "trim", "metrics", "devices", "reset", "unload", "quit"});
    if (request.op == "cancel") {
      check_fields(*request.body, {});
      cancelled_through_ = accepted_;
      const std::lock_guard lock(handles_mutex_);
      cfmoe_session_cancel(session_);
      reply(request, "ok");
      return;
    }
    if (request.op == "trim") {
      check_fields(*request.body, {"memory_budget"});
      const uint64_t budget = trim_budget(*request.body);
      const std::lock_guard lock(handles_mutex_);
      Call call;
      if (engine_ != nullptr) call.check(cfmoe_engine_trim(engine_, budget, call.error(), Call::size()));
    }
    if (request.op == "quit") {
      check_fields(*request.body, {});
      cancelled_through_ = accepted_;
      const std::lock_guard lock(handles_mutex_);
      cfmoe_session_cancel(session_);
    }
    enqueue(std::move(request));
  } catch (const Error& error) {
    fail(request.id, "protocol", error.what());
  } catch (const std::exception& error) {
    fail(request.id, "internal", error.what());
  }
}

void Server::enqueue(Request request) {
  const std::lock_guard lock(queue_mutex_);
  request.number = ++accepted_;
  ended_ = request.op == "quit";
  queue_.push_back(std::move(request));
  arrived_.notify_all();
}

void Server::work() {
  for (;;) {
    std::unique_lock lock(queue_mutex_);
    arrived_.wait(lock, [&] { return ended_ || !queue_.empty(); });
    if (queue_.empty() || broken_) return;
    const Request request = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    handle(request);
    if (request.op == "quit") return;
  }
}

void Server::handle(const Request& request) {
  try {
    const JsonValue& body = *request.body;
    if (request.op == "load") {
      load(request);
    } else if (request.op == "generate") {
      generate(request);
    } else if (request.op == "set_budget") {
      set_budget(request);
    } else if (request.op == "trim") {
      // Done already, unless a load was still to come.
      Call call;
      call.check(cfmoe_engine_trim(engine(), trim_budget(body), call.error(), Call::size()));
      reply(request, "budget", JsonObject().add("memory", memory_json(engine_)));
    } else if (request.op == "metrics") {
      report_metrics(request);
    } else if (request.op == "devices") {
      report_devices(request);
    } else if (request.op == "reset") {
      check_fields(body, {"keep_experts"});
      engine();
      Call call;
      call.check(flag(body, "keep_experts") ? cfmoe_session_rewind(session_, 0, call.error(), Call::size())
                                            : cfmoe_session_reset(session_, call.error(), Call::size()));
      reply(request, "ok");
    } else {  // unload, quit
      check_fields(body, {});
      unload();
      reply(request, "ok");
    }
  } catch (const Error& error) {
    fail(request.id, error.kind() == ErrorKind::kUser ? "user" : "internal", error.what());
  } catch (const std::exception& error) {
    fail(request.id, "internal", error.what());
  }
}

cfmoe_engine* Server::engine() const {
  if (engine_ == nullptr) throw Error("no artifact is loaded: send load first");
  return engine_;
}

void Server::load(const Request& request) {
  const JsonValue& body = *request.body;
  check_fields(body, {"artifact", "memory_budget", "expert_percent", "context_size", "threads", "io", "policy",
                      "device", "prefill_device", "decode_device"});
  if (engine_ != nullptr) throw Error("an artifact is loaded already: send unload first");
  const std::string artifact = body.at("artifact").string();
  const auto text = [&](const char* name) { return given(body, name) ? body.at(name).string() : std::string(); };
  const std::string io = text("io"), policy = text("policy"), device = text("device"),
                    prefill_device = text("prefill_device"), decode_device = text("decode_device");
  cfmoe_engine_options options;
  cfmoe_engine_options_init(&options);
  std::tie(options.budget_bytes, options.expert_percent) = budget_of(body);
  options.context_size = small_number(body, "context_size", 0);
  options.threads = static_cast<int32_t>(small_number(body, "threads", 0));
  if (!io.empty()) options.io = io.c_str();
  if (!policy.empty()) options.policy = policy.c_str();
  if (!device.empty()) options.device = device.c_str();
  if (!prefill_device.empty()) options.prefill_device = prefill_device.c_str();
  if (!decode_device.empty()) options.decode_device = decode_device.c_str();

  Call call;
  cfmoe_engine* engine = nullptr;
  call.check(cfmoe_engine_open(artifact.c_str(), &options, &engine, call.error(), Call::size()));
  const std::lock_guard lock(handles_mutex_);
  engine_ = engine;
  call.check(cfmoe_session_create(engine_, &session_, call.error(), Call::size()));
  // Without a tokenizer that this runtime reads there are still token ids.
  const bool has_text = cfmoe_tokenizer_open(artifact.c_str(), &tokenizer_, call.error(), Call::size()) == CFMOE_OK;
  JsonObject out;
  out.add("model", model_json(engine_))
      .add("memory", memory_json(engine_))
      .add("io", cfmoe_engine_io(engine_))
      .add("policy", cfmoe_engine_policy(engine_))
      .add("prefill_device", cfmoe_engine_device(engine_, 0))
      .add("decode_device", cfmoe_engine_device(engine_, 1))
      .add("device_name", cfmoe_engine_device_name(engine_))
      .add("warning", cfmoe_engine_warning(engine_))
      .add("text", has_text)
      .add("text_error", has_text ? "" : call.error());
  reply(request, "loaded", out);
}

void Server::unload() {
  const std::lock_guard lock(handles_mutex_);
  cfmoe_session_destroy(std::exchange(session_, nullptr));
  cfmoe_tokenizer_close(std::exchange(tokenizer_, nullptr));
  cfmoe_engine_close(std::exchange(engine_, nullptr));
}

void Server::set_budget(const Request& request) {
  check_fields(*request.body, {"memory_budget", "expert_percent"});
  const auto [bytes, percent] = budget_of(*request.body);
  Call call;
  call.check(cfmoe_engine_set_budget(engine(), bytes, percent, call.error(), Call::size()));
  JsonObject out;
  reply(request, "budget", out.add("memory", memory_json(engine_)));
}

void Server::report_metrics(const Request& request) {
  check_fields(*request.body, {});
  JsonObject out;
  out.add("loaded", engine_ != nullptr);
  if (engine_ == nullptr) {
    out.add("rss_bytes", resident_memory().now);
  } else {
    out.add("position", cfmoe_session_position(session_))
        .add("metrics", metrics_json(session_))
        .add("memory", memory_json(engine_))
        .raw("residents", residents_json(engine_));
  }
  reply(request, "metrics", out);
}

// The GPUs by the kind that a load names; a kind that has no driver here is left out.
void Server::report_devices(const Request& request) {
  check_fields(*request.body, {});
  JsonObject devices;
  for (const char* kind : {"vulkan", "opencl", "metal"}) {
    std::string list(kTextBytes, '\0');
    size_t size = 0;
    Call call;
    const cfmoe_status status = cfmoe_devices(kind, list.data(), list.size(), &size, call.error(), Call::size());
    if (status != CFMOE_OK || size >= list.size()) continue;
    list.resize(size);
    devices.raw(kind, list);
  }
  reply(request, "devices", JsonObject().add("devices", devices));
}

std::vector<int32_t> Server::prompt_of(const JsonValue& body) const {
  const std::optional<JsonValue> tokens = given(body, "tokens"), prompt = given(body, "prompt");
  if (tokens.has_value() == prompt.has_value()) throw Error("request: give prompt or tokens, one of them");
  if (tokens) return tokens->int32_list(0, std::numeric_limits<int32_t>::max(), kMaxTokens);
  std::string text;
  std::vector<size_t> plain;  // begin and end of what was typed
  if (prompt->is_array()) {
    for (const JsonValue& piece : prompt->elements(kMaxPieces)) {
      for (const std::string& name : piece.keys())
        if (name != "text" && name != "typed") piece.at(name).fail("is unknown");
      const size_t begin = text.size();
      text += piece.at("text").text(kMaxPrompt);
      if (flag(piece, "typed")) plain.insert(plain.end(), {begin, text.size()});
      if (text.size() > kMaxPrompt) prompt->fail("has more than " + std::to_string(kMaxPrompt) + " bytes");
    }
  } else {
    text = prompt->text(kMaxPrompt);
  }
  if (tokenizer_ == nullptr) throw Error("this artifact's tokenizer cannot be used here: give tokens");
  std::vector<int32_t> ids(text.size());
  size_t count = 0;
  Call call;
  call.check(cfmoe_tokenizer_encode_typed(tokenizer_, text.data(), text.size(), plain.data(), plain.size() / 2,
                                          ids.data(), ids.size(), &count, call.error(), Call::size()));
  ids.resize(count);
  return ids;
}

std::string Server::text_of(int32_t token) {
  std::string text(kTextBytes, '\0');
  size_t size = 0;
  Call call;
  call.check(cfmoe_tokenizer_push(tokenizer_, token, text.data(), text.size(), &size, call.error(), Call::size()));
  text.resize(size);
  return text;
}

int Server::on_token(const Request& request, int32_t token) {
  try {
    JsonObject out;
    out.add("token", token);
    if (tokenizer_ != nullptr) out.add("text", text_of(token));
    reply(request, "token", out);
    for (;;) {
      std::unique_lock lock(queue_mutex_);
      const bool now = !queue_.empty() && (queue_.front().op == "metrics" || queue_.front().op == "set_budget" ||
                                           queue_.front().op == "trim");
      if (!now) break;
      const Request between = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      handle(between);
    }
  } catch (const std::exception& error) {
    failure_ = error.what();
    return 1;
  }
  return cancelled(request) ? 1 : 0;
}

void Server::generate(const Request& request) {
  const JsonValue& body = *request.body;
  check_fields(body, {"prompt", "tokens", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty",
                      "seed", "stop_tokens", "position", "reset"});
  engine();
  Call call;
  const std::vector<int32_t> prompt = prompt_of(body);
  const uint32_t most = small_number(body, "max_new_tokens", kDefaultNewTokens);
  cfmoe_sampling sampling;
  cfmoe_sampling_init(&sampling);
  sampling.temperature = fraction(body, "temperature", 0);
  sampling.top_k = static_cast<int32_t>(small_number(body, "top_k", 0));
  sampling.top_p = fraction(body, "top_p", 1);
  sampling.repetition_penalty = fraction(body, "repetition_penalty", 1);
  if (const std::optional<JsonValue> seed = given(body, "seed")) sampling.seed = seed->size_value();
  std::optional<std::vector<int32_t>> stops;
  if (const std::optional<JsonValue> tokens = given(body, "stop_tokens")) {
    stops = tokens->int32_list(0, std::numeric_limits<int32_t>::max(), 1024);
    stops->reserve(1);  // a pointer even if there are none
  }
  if (flag(body, "reset")) call.check(cfmoe_session_reset(session_, call.error(), Call::size()));
  if (given(body, "position"))
    call.check(cfmoe_session_rewind(session_, small_number(body, "position", 0), call.error(), Call::size()));
  if (tokenizer_ != nullptr) text_of(-1);

  uint32_t count = 0;
  cfmoe_status status = CFMOE_CANCELLED;
  failure_.clear();
  if (!cancelled(request)) {
    auto on_each = [&](int32_t token) { return on_token(request, token); };
    const auto callback = [](int32_t token, void* user) { return (*static_cast<decltype(on_each)*>(user))(token); };
    status = cfmoe_session_generate(session_, prompt.data(), static_cast<uint32_t>(prompt.size()), most, &sampling,
                                    stops ? stops->data() : nullptr, stops ? static_cast<uint32_t>(stops->size()) : 0,
                                    callback, &on_each, nullptr, &count, call.error(), Call::size());
  }
  if (status != CFMOE_CANCELLED) call.check(status);
  if (!failure_.empty()) throw Error(ErrorKind::kInternal, failure_);
  cfmoe_model_info model = {};
  cfmoe_engine_model(engine_, &model);
  const char* reason = status == CFMOE_CANCELLED || cancelled(request)         ? "cancelled"
                       : count == most                                         ? "length"
                       : cfmoe_session_position(session_) > model.context_size ? "context"
                                                                               : "stop";
  JsonObject out;
  out.add("finish_reason", reason).add("prompt_tokens", prompt.size()).add("new_tokens", count);
  if (tokenizer_ != nullptr) out.add("text", text_of(-1));
  out.add("position", cfmoe_session_position(session_))
      .add("metrics", metrics_json(session_))
      .add("memory", memory_json(engine_));
  reply(request, "done", out);
}

}  // namespace

int serve_stdio(std::FILE* in, std::FILE* out) {
  ::signal(SIGPIPE, SIG_IGN);
  Server server(::fileno(in), out);
  return server.run();
}

}  // namespace cfmoe::tools
