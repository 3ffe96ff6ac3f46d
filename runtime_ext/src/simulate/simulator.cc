// The engine's steps are laid out once; a run walks them with a policy.
#include "simulate/simulator.h"

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"
#include "simulate/oracle_policies.h"

namespace cfmoe {
namespace {

constexpr const char* kOracles[] = {"opt", "opt-bypass", "lopt"};

class NoActions final : public Residency::Actions {
 public:
  void load(ExpertKey, Phase) override {}
  void evict(ExpertKey, Phase) override {}
};

// [token][layer][width] to [layer][token][width].
template <typename From, typename To>
void transpose(const std::vector<From>& from, size_t layers, size_t width, std::vector<To>* to) {
  to->resize(from.size());
  const size_t tokens = from.size() / (layers * width);
  for (size_t token = 0; token < tokens; ++token) {
    for (size_t layer = 0; layer < layers; ++layer) {
      std::copy_n(from.begin() + static_cast<ptrdiff_t>((token * layers + layer) * width), width,
                  to->begin() + static_cast<ptrdiff_t>((layer * tokens + token) * width));
    }
  }
}

}  // namespace

Simulator::Simulator(const Trace& trace, const SimulatorOptions& options)
    : options_(options),
      layers_(trace.layers),
      experts_(trace.experts),
      top_k_(trace.top_k),
      tokens_(static_cast<uint32_t>(trace.tokens())) {
  if (trace.ids.size() >= Future::kNever / 2)
    throw Error("the trace has " + std::to_string(trace.ids.size()) + " accesses, more than the simulator takes (" +
                std::to_string(Future::kNever / 2) + "): cut it into several");
  if (layers_ * experts_ > kMostExperts)
    throw Error("the trace is of " + std::to_string(layers_) + " layers of " + std::to_string(experts_) +
                " experts, more than the " + std::to_string(kMostExperts) +
                " that the simulator takes: record fewer layers");
  if (options_.chunk_size == 0) options_.chunk_size = trace.chunk_size > 0 ? trace.chunk_size : kDefaultChunk;
  transpose(trace.ids, static_cast<size_t>(layers_), static_cast<size_t>(top_k_), &ids_);
  transpose(trace.scores, static_cast<size_t>(layers_), static_cast<size_t>(experts_), &scores_);
  uint64_t offset = 0;
  for (const TraceSegment& segment : trace.segments) {
    if (segment.begins_sample && options_.warm) offset = position_.empty() ? 0 : position_.back() + 1;
    for (uint32_t i = 0; i < segment.tokens; ++i) {
      position_.push_back(offset + segment.position + i);
      phase_.push_back(segment.phase);
    }
  }
  plan(trace);
  future_ = std::make_unique<Future>(std::move(order_), layers_ * experts_);
}

std::span<const int32_t> Simulator::ids(int32_t layer, uint32_t token, uint32_t tokens) const {
  const auto width = static_cast<size_t>(top_k_);
  return std::span(ids_).subspan((static_cast<size_t>(layer) * tokens_ + token) * width, tokens * width);
}

std::span<const uint16_t> Simulator::scores(int32_t layer, uint32_t token, uint32_t tokens) const {
  if (scores_.empty()) return {};
  const auto width = static_cast<size_t>(experts_);
  return std::span(scores_).subspan((static_cast<size_t>(layer) * tokens_ + token) * width, tokens * width);
}

void Simulator::end_sample(size_t sample_step) {
  if (sample_step < steps_.size()) steps_[sample_step].last_time = static_cast<uint32_t>(order_.size()) - 1;
}

void Simulator::plan(const Trace& trace) {
  uint32_t token = 0;
  size_t sample = steps_.max_size();
  for (const TraceSegment& segment : trace.segments) {
    if (segment.begins_sample) {
      end_sample(sample);
      sample = steps_.size();
      steps_.push_back(Step{Step::Kind::kSample});
    }
    const bool chunked = segment.phase == Phase::kPrefill && !options_.reference;
    const uint32_t end = token + segment.tokens;
    for (uint32_t count; token < end; token += count) {
      count = chunked ? std::min(options_.chunk_size, end - token) : 1;
      for (int32_t layer = 0; layer < layers_; ++layer) {
        if (chunked) {
          plan_prefill_layer(layer, token, count);
        } else {
          plan_group(layer, token);
        }
      }
    }
    if (segment.hand_over && !options_.reference) steps_.push_back(Step{Step::Kind::kHandOver});
  }
  end_sample(sample);
}

void Simulator::plan_group(int32_t layer, uint32_t token) {
  for (const int32_t expert : ids(layer, token, 1)) order_.push_back(static_cast<uint32_t>(layer * experts_ + expert));
  steps_.push_back(Step{Step::Kind::kGroup, layer, token, 1, 0, 0, static_cast<uint32_t>(order_.size()) - 1});
}

void Simulator::plan_prefill_layer(int32_t layer, uint32_t first_token, uint32_t tokens) {
  std::vector<int64_t> last(static_cast<size_t>(experts_), -1);
  const std::span<const int32_t> chosen = ids(layer, first_token, tokens);
  for (size_t i = 0; i < chosen.size(); ++i)
    last[static_cast<size_t>(chosen[i])] = static_cast<int64_t>(i / static_cast<size_t>(top_k_));
  Step step{Step::Kind::kPrefillLayer, layer, first_token, tokens, static_cast<uint32_t>(chunk_experts_.size())};
  for (int32_t expert = 0; expert < experts_; ++expert) {
    if (last[static_cast<size_t>(expert)] < 0) continue;
    chunk_experts_.push_back(expert);
    chunk_last_positions_.push_back(position_[first_token] + static_cast<uint64_t>(last[static_cast<size_t>(expert)]));
    order_.push_back(static_cast<uint32_t>(layer * experts_ + expert));
  }
  step.experts_end = static_cast<uint32_t>(chunk_experts_.size());
  step.last_time = static_cast<uint32_t>(order_.size()) - 1;
  steps_.push_back(step);
}

std::unique_ptr<CachePolicy> Simulator::policy(const std::string& name, const PolicyFacts& facts, uint32_t lookahead,
                                               const Clock& clock) const {
  if (name == "opt" || name == "opt-bypass")
    return std::make_unique<OptPolicy>(facts, *future_, clock, name == "opt-bypass");
  if (name == "lopt") return std::make_unique<LoptPolicy>(facts, *future_, clock, lookahead);
  const std::vector<std::string> names = policy_names();
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    std::string known;
    for (const std::string& each : names) known += (known.empty() ? "" : ", ") + each;
    throw Error("cache policy \"" + name + "\" is unknown; use one of: " + known);
  }
  std::unique_ptr<CachePolicy> policy = make_policy(name, facts);
  if (policy->wants_scores() && scores_.empty())
    throw Error("cache policy \"" + name +
                "\" predicts from the router's scores, which the trace does not have: record "
                "it again with --scores, or use another policy");
  return policy;
}

std::vector<std::string> Simulator::policy_names() {
  std::vector<std::string> names = cfmoe::policy_names();
  names.insert(names.end(), std::begin(kOracles), std::end(kOracles));
  return names;
}

// One run over the steps.
class Simulator::Replay {
 public:
  Replay(const Simulator& simulator, const std::string& policy, const PolicyFacts& facts, uint32_t lookahead)
      : simulator_(simulator),
        policy_(simulator.policy(policy, facts, lookahead, clock_)),
        scored_(policy_->wants_scores()) {
    result_.decode_groups_by_misses.assign(static_cast<size_t>(facts.top_k) + 1, 0);
    clock_.horizon = simulator.future_->length();
  }

  Simulation as_engine(const PolicyFacts& facts) {
    NoActions actions;
    Residency residency(facts, std::move(policy_), actions, false);
    for (const Step& step : simulator_.steps_) {
      if (step.kind == Step::Kind::kSample) {
        if (!begins_cold(step)) continue;
        residency.clear();
      } else if (step.kind == Step::Kind::kHandOver) {
        result_.hand_over_loads += residency.hand_over();
      } else if (step.kind == Step::Kind::kPrefillLayer) {
        note(residency, Phase::kPrefill, step);
        const size_t count = step.experts_end - step.experts_begin;
        Residency::PrefillPass pass(residency, step.layer,
                                    std::span(simulator_.chunk_experts_).subspan(step.experts_begin, count),
                                    std::span(simulator_.chunk_last_positions_).subspan(step.experts_begin, count));
        pass.issue();
        while (pass.done() < pass.size()) pass.complete();
      } else {
        note(residency, Phase::kDecode, step);
        residency.decode_group(step.layer, simulator_.ids(step.layer, step.first_token, 1),
                               simulator_.position_[step.first_token], &hits_);
        ++result_.decode_groups_by_misses[static_cast<size_t>(std::count(hits_.begin(), hits_.end(), false))];
      }
    }
    result_.prefill = residency.counts(Phase::kPrefill);
    result_.decode = residency.counts(Phase::kDecode);
    return std::move(result_);
  }

  Simulation as_reference(const PolicyFacts& facts) {
    std::vector<bool> resident(static_cast<size_t>(facts.total()));
    int32_t count = 0;
    const CachePolicy::Pinned none = [](ExpertKey) { return false; };
    for (const Step& step : simulator_.steps_) {
      if (step.kind == Step::Kind::kSample) {
        if (!begins_cold(step)) continue;
        policy_->clear();
        std::fill(resident.begin(), resident.end(), false);
        count = 0;
        continue;
      }
      const std::span<const int32_t> group = simulator_.ids(step.layer, step.first_token, 1);
      const Phase phase = simulator_.phase_[step.first_token];
      const uint64_t position = simulator_.position_[step.first_token];
      AccessCounts& counts = phase == Phase::kPrefill ? result_.prefill : result_.decode;
      policy_->on_route(step.layer, group, scored_ ? simulator_.scores(step.layer, step.first_token, 1) : kNoScores,
                        position);
      size_t misses = 0;
      for (size_t i = 0; i < group.size(); ++i) {
        const ExpertKey key{step.layer, group[i]};
        const auto id = static_cast<size_t>(facts.id_of(key));
        clock_.now = int64_t{step.last_time} - static_cast<int64_t>(group.size() - 1 - i);
        ++(resident[id] ? counts.hits : counts.misses);
        if (!resident[id]) {
          ++misses;
          if (facts.slots == 0 || (count == facts.slots && !policy_->admits(key))) continue;
          ExpertKey victim;
          if (count == facts.slots && policy_->victim(key, none, &victim)) {
            policy_->on_evict(victim);
            resident[static_cast<size_t>(facts.id_of(victim))] = false;
            --count;
          }
          policy_->on_insert(key, position);
          resident[id] = true;
          ++count;
        }
        policy_->on_access(key, position);
      }
      if (phase == Phase::kDecode) ++result_.decode_groups_by_misses[misses];
    }
    return std::move(result_);
  }

 private:
  static constexpr std::span<const uint16_t> kNoScores{};

  // Whether the cache is to be emptied; then what lies behind the sample is out of sight.
  bool begins_cold(const Step& sample) {
    if (simulator_.options_.warm) return false;
    clock_.horizon = sample.last_time + 1;
    return true;
  }

  void note(Residency& residency, Phase phase, const Step& step) {
    clock_.now = step.last_time;
    residency.note_routing(phase, step.layer, simulator_.ids(step.layer, step.first_token, step.tokens),
                           scored_ ? simulator_.scores(step.layer, step.first_token, step.tokens) : kNoScores,
                           simulator_.position_[step.first_token]);
  }

  const Simulator& simulator_;
  Clock clock_;
  std::unique_ptr<CachePolicy> policy_;
  bool scored_;
  std::vector<bool> hits_;
  Simulation result_;
};

Simulation Simulator::run(const std::string& policy, int64_t slots, uint32_t lookahead) const {
  PolicyFacts facts{layers_, experts_, top_k_, 0};
  const int64_t least = options_.reference ? 0 : top_k_;
  if (slots < least)
    throw Error("a cache of " + std::to_string(slots) + " experts is smaller than the " + std::to_string(least) +
                " that one token needs in one layer: use at least " + std::to_string(least) +
                ", or simulate with --semantics reference");
  facts.slots = static_cast<int32_t>(std::min<int64_t>(slots, facts.total()));
  Replay replay(*this, policy, facts, lookahead);
  return options_.reference ? replay.as_reference(facts) : replay.as_engine(facts);
}

}  // namespace cfmoe
