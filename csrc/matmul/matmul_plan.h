// Who computes what in the decode GEMM: arithmetic alone, for host and device, tested on a CPU
// (tests/ops/test_matmul_plan.py).
//
// The output is cut into tiles of 64 columns, and k into chunks. Every block is dealt some whole
// tiles. The rest of the tiles is cut along k into parts, in one of two ways:
//
//   dealt    The rest is what is left over, fewer tiles than blocks. Every block is dealt up to
//            parts_per_block of its parts, before its whole tiles: what it takes to put them
//            together hides behind these. All blocks stream the same number of bytes.
//   claimed  The rest is a share of all tiles, and comes last. A block that is done with its own
//            claims one part after the other, as the next number of a counter: a multiprocessor
//            that gets less of the bandwidth than others then computes less.
//
// Where a tile is cut and in which order its parts are added is the plan's alone, and so are a
// result's bits: they do not depend on who computes what, nor on when.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "gpu/host_device.h"

namespace commfuse::gpu {

constexpr int kTileColumns = 64;
constexpr int kChunk = 128;      // k of a stage of the ring; parts of tiles are cut here
constexpr int kMaxSplits = 16;   // of a tile
constexpr int kMostRest = 1024;  // tiles; and blocks

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct MatmulPlan {
  int tiles;
  int chunks;
  int blocks;  // all must be able to run at the same time
  int rounds;
  int rest;
  int splits;           // parts of each tile of the rest; 1: whole
  int parts_per_block;  // the most that a block is dealt, where parts are dealt
  bool claimed;
};

// A tile, or a part of one: chunks [begin, end) of its k.
struct TileSegment {
  int tile;
  int part;  // -1: the whole tile
  int begin, end;
};

COMMFUSE_HOST_DEVICE inline int parts_of_rest(const MatmulPlan& plan) {
  return plan.rest * plan.splits;
}

// Tiles are numbered as they are finished.
COMMFUSE_HOST_DEVICE inline int first_of_rest(const MatmulPlan& plan) {
  return plan.claimed ? plan.rounds * plan.blocks : 0;
}

// The index-th part of the rest. Parts that are dealt go round the tiles, so that a block's
// neighbours read other tiles; parts that are claimed finish one tile after the other, so that only
// the last are put together when all else has been done.
COMMFUSE_HOST_DEVICE inline TileSegment part_of_rest(const MatmulPlan& plan, int index) {
  const int part = plan.claimed ? index % plan.splits : index / plan.rest;
  const int tile = plan.claimed ? index / plan.splits : index % plan.rest;
  const auto border = [&](int p) {
    return static_cast<int>(static_cast<int64_t>(plan.chunks) * p / plan.splits);
  };
  return {first_of_rest(plan) + tile, plan.splits == 1 ? -1 : part, border(part), border(part + 1)};
}

// The i-th segment that a block is dealt, i < rounds + parts_per_block; false: it has none at i.
// Parts that are claimed on one GPU are dealt on another, behind the whole tiles.
COMMFUSE_HOST_DEVICE inline bool segment_at(const MatmulPlan& plan, int block, int i,
                                            TileSegment* s) {
  const int round = plan.claimed ? i : i - plan.parts_per_block;
  if (round >= 0 && round < plan.rounds) {
    const int first = plan.claimed ? 0 : plan.rest;
    *s = {first + round * plan.blocks + block, -1, 0, plan.chunks};
    return true;
  }
  const int index = (plan.claimed ? i - plan.rounds : i) * plan.blocks + block;
  if (index >= parts_of_rest(plan)) return false;
  *s = part_of_rest(plan, index);
  return true;
}

// A block claims until it gets a number that is no part any more, so every block gets one such
// number; who gets this one is the last to touch the counter, and sets it back.
COMMFUSE_HOST_DEVICE inline int last_claim(const MatmulPlan& plan) {
  return parts_of_rest(plan) + plan.blocks - 1;
}

namespace plan_detail {

// Cuts what is left over so that it takes least, in units of the time that a block takes for a tile
// when all blocks stream. Fewer blocks stream faster, each up to kAlone of its share; putting parts
// together costs time that only k pays for.
inline void deal_rest(MatmulPlan& plan, int64_t k, int max_blocks) {
  constexpr double kAlone = 1.6, kCombine = 390.0;
  double best = 0;
  for (int splits = 1; splits <= std::min(kMaxSplits, plan.chunks); ++splits) {
    const int per_block = static_cast<int>(divide_up(int64_t{plan.rest} * splits, max_blocks));
    const double time =
        std::max(static_cast<double>(plan.rest) / max_blocks, per_block / (kAlone * splits)) +
        (splits > 1 ? per_block * kCombine / static_cast<double>(k) : 0);
    if (splits > 1 && time >= best) continue;
    best = time;
    plan.splits = splits;
    plan.parts_per_block = per_block;
  }
  if (plan.rounds == 0) {
    plan.blocks = static_cast<int>(divide_up(parts_of_rest(plan), plan.parts_per_block));
  }
}

// About four parts for each block, none so short that the time to put them together shows, and of a
// tile no more than a thread can load at once (finish_segment).
inline void share_rest(MatmulPlan& plan) {
  constexpr int kPartsPerBlock = 4, kFewestChunks = 4, kMostParts = 6;
  const int most = std::clamp(plan.chunks / kFewestChunks, 1, kMostParts);
  const int64_t wanted = divide_up(int64_t{kPartsPerBlock} * plan.blocks, plan.rest);
  plan.splits = static_cast<int>(std::min<int64_t>(wanted, most));
  plan.parts_per_block = static_cast<int>(divide_up(parts_of_rest(plan), plan.blocks));
}

}  // namespace plan_detail

// A function of N, K, the blocks and the share alone: M never enters, so that a row's bits do not
// depend on its batch.
//
// claimed_percent: the least share of the tiles that is claimed; 0: all are dealt. They are too
// where a block would not have a whole tile to begin with, whose weights it can fetch early.
inline MatmulPlan matmul_plan(int64_t n, int64_t k, int max_blocks, int claimed_percent) {
  if (n < 1 || k < 1 || max_blocks < 1) throw std::invalid_argument("matmul: N, K, blocks < 1");
  if (claimed_percent < 0 || claimed_percent > 100) {
    throw std::invalid_argument("matmul: the claimed share is a percentage, 0 to 100");
  }
  max_blocks = std::min(max_blocks, kMostRest);
  MatmulPlan plan = {};
  plan.tiles = static_cast<int>(divide_up(n, kTileColumns));
  plan.chunks = static_cast<int>(divide_up(k, kChunk));
  plan.splits = 1;
  const int64_t kept = int64_t{plan.tiles} * (100 - claimed_percent) / 100;
  const int rounds = static_cast<int>(
      std::max(kept / max_blocks, divide_up(int64_t{plan.tiles} - kMostRest, max_blocks)));
  plan.claimed = claimed_percent > 0 && rounds > 0;
  plan.rounds = plan.claimed ? rounds : plan.tiles / max_blocks;
  plan.rest = plan.tiles - plan.rounds * max_blocks;
  plan.blocks = plan.rounds > 0 ? max_blocks : plan.rest;
  if (plan.claimed) {
    plan_detail::share_rest(plan);
  } else if (plan.rest > 0) {
    plan_detail::deal_rest(plan, k, max_blocks);
  }
  return plan;
}

}  // namespace commfuse::gpu
