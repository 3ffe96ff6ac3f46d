// Ids in the order of their last use, as a linked ring in one array.
#pragma once

#include <cstdint>
#include <vector>

namespace cfmoe {

class RecencyList {
 public:
  explicit RecencyList(int32_t size) : head_(size) { clear(); }

  void clear() {
    nodes_.assign(static_cast<size_t>(head_) + 1, Node{});
    nodes_.back() = Node{head_, head_};
  }
  bool contains(int32_t id) const { return node(id).next >= 0; }
  // Ids must not be in the list before, and must be in it, respectively.
  void push_most_recent(int32_t id) {
    Node& head = node(head_);
    node(id) = Node{head.previous, head_};
    node(head.previous).next = id;
    head.previous = id;
  }
  void remove(int32_t id) {
    Node& each = node(id);
    node(each.previous).next = each.next;
    node(each.next).previous = each.previous;
    each = Node{};
  }
  // The least recent for which `excluded(id)` is false; -1 if there is none.
  template <typename Excluded>
  int32_t least_recent(const Excluded& excluded) const {
    for (int32_t id = node(head_).next; id != head_; id = node(id).next) {
      if (!excluded(id)) return id;
    }
    return -1;
  }

 private:
  struct Node {
    int32_t previous = -1, next = -1;  // -1: not in the list
  };
  Node& node(int32_t id) { return nodes_[static_cast<size_t>(id)]; }
  const Node& node(int32_t id) const { return nodes_[static_cast<size_t>(id)]; }

  int32_t head_;  // next of it is the least recent, previous of it the most recent
  std::vector<Node> nodes_;
};

}  // namespace cfmoe
