// The last thresholds of the tensors that were selected from, for `select_topk` to start from.
#pragma once

#include "masked_kernels/kernels.h"

#include <array>
#include <atomic>

namespace masked_kernels {

// Found by the scores' address and by what is asked of them. As a wrong guess does no harm, slots
// are few, tensors may share one, and none is told when a tensor is freed. Threads may use it at
// once.
class LastCuts {
 public:
  LastCut find(const SelectTopk& p) const {
    const uint64_t hash = hash_of(p), entry = slots_[slot_of(hash)].load(std::memory_order_relaxed);
    if ((entry & kTagMask) != tag_of(hash))
      return {};
    return {static_cast<uint32_t>(entry >> 32), static_cast<int>(entry >> kTagBits & 0xff)};
  }

  void put(const SelectTopk& p, LastCut cut) {
    if (cut.reach < 0)
      return;
    const uint64_t hash = hash_of(p);
    const uint64_t entry =
        uint64_t{cut.key} << 32 | static_cast<uint64_t>(cut.reach) << kTagBits | tag_of(hash);
    slots_[slot_of(hash)].store(entry, std::memory_order_relaxed);
  }

  void forget() {
    for (std::atomic<uint64_t>& slot : slots_)
      slot.store(0, std::memory_order_relaxed);
  }

 private:
  // A slot holds a key in its high half, then a reach, then a tag that tells its scores from
  // others; no tag is 0.
  static constexpr int kSlotBits = 12, kTagBits = 24;
  static constexpr uint64_t kTagMask = (uint64_t{1} << kTagBits) - 1;

  static uint64_t hash_of(const SelectTopk& p) {
    uint64_t hash = reinterpret_cast<uintptr_t>(p.scores);
    for (const uint64_t asked : {static_cast<uint64_t>(p.drop), uint64_t{p.absolute}})
      hash = (hash ^ hash >> 29 ^ asked) * 0x9e3779b97f4a7c15u; // of the golden ratio
    return hash;
  }
  static uint64_t slot_of(uint64_t hash) { return hash >> (64 - kSlotBits); }
  static uint64_t tag_of(uint64_t hash) { return (hash & kTagMask) | 1; }

  std::array<std::atomic<uint64_t>, 1 << kSlotBits> slots_ = {};
};

} // namespace masked_kernels
