// Least recently used, as a linked ring in one array.
#include "cache/lru_policy.h"

#include <string>

#include "error.h"

namespace cfmoe {

LruPolicy::LruPolicy(int32_t layers, int32_t experts) : layers_(layers), experts_(experts), head_(layers * experts) {
  clear();
}

int32_t LruPolicy::id_of(ExpertKey key) const {
  if (key.layer < 0 || key.layer >= layers_ || key.expert < 0 || key.expert >= experts_) {
    throw Error(ErrorKind::kInternal,
                "lru: no expert " + std::to_string(key.expert) + " in MoE layer " + std::to_string(key.layer));
  }
  return key.layer * experts_ + key.expert;
}

void LruPolicy::link_most_recent(int32_t id) {
  Node& head = nodes_[static_cast<size_t>(head_)];
  nodes_[static_cast<size_t>(id)] = Node{head.previous, head_};
  nodes_[static_cast<size_t>(head.previous)].next = id;
  head.previous = id;
}

void LruPolicy::unlink(int32_t id) {
  Node& node = nodes_[static_cast<size_t>(id)];
  nodes_[static_cast<size_t>(node.previous)].next = node.next;
  nodes_[static_cast<size_t>(node.next)].previous = node.previous;
  node = Node{};
}

void LruPolicy::on_access(ExpertKey key, uint64_t) {
  int32_t id = id_of(key);
  if (!linked(id)) throw Error(ErrorKind::kInternal, "lru: access to an expert that is not resident");
  unlink(id);
  link_most_recent(id);
}

void LruPolicy::on_insert(ExpertKey key, uint64_t) {
  int32_t id = id_of(key);
  if (linked(id)) throw Error(ErrorKind::kInternal, "lru: an expert was inserted twice");
  link_most_recent(id);
}

void LruPolicy::on_evict(ExpertKey key) {
  int32_t id = id_of(key);
  if (!linked(id)) throw Error(ErrorKind::kInternal, "lru: an expert was evicted that is not resident");
  unlink(id);
}

bool LruPolicy::victim(const std::function<bool(ExpertKey)>& pinned, ExpertKey* out) const {
  for (int32_t id = nodes_[static_cast<size_t>(head_)].next; id != head_; id = nodes_[static_cast<size_t>(id)].next) {
    ExpertKey key{id / experts_, id % experts_};
    if (pinned(key)) continue;
    *out = key;
    return true;
  }
  return false;
}

void LruPolicy::clear() {
  nodes_.assign(static_cast<size_t>(head_) + 1, Node{});
  nodes_.back() = Node{head_, head_};
}

}  // namespace cfmoe
