// The decode GEMM's plan for ctypes: plans and segments as rows of integers.
#include "matmul/matmul_plan.h"

using namespace commfuse::gpu;

namespace {

void put(const TileSegment& s, int* out) {
  out[0] = s.tile;
  out[1] = s.part;
  out[2] = s.begin;
  out[3] = s.end;
}

}  // namespace

extern "C" {

// A plan that the functions below work on; valid until the next.
static MatmulPlan current;

void make_plan(int64_t n, int64_t k, int max_blocks, int claimed_percent, int* out) {
  current = matmul_plan(n, k, max_blocks, claimed_percent);
  const int fields[] = {current.tiles, current.chunks, current.blocks,          current.rounds,
                        current.rest,  current.splits, current.parts_per_block, current.claimed};
  std::copy(std::begin(fields), std::end(fields), out);
}

bool dealt(int block, int i, int* out) {
  TileSegment s;
  if (!segment_at(current, block, i, &s)) return false;
  put(s, out);
  return true;
}

void part(int index, int* out) { put(part_of_rest(current, index), out); }

int parts() { return parts_of_rest(current); }

int last() { return last_claim(current); }
}
