// Drawing tokens from vocabulary shards in one launch, the exchange between ranks included. What is
// drawn is that of sample.h: per block of 128 tokens log(sum of weights) - log(exponential noise),
// the largest of all blocks, then a draw by weight inside that block.
//
//   plain rows      whose candidates can be found in one pass over the logits. Their blocks of
//                   tokens are dealt out evenly to the grid, whatever rows they belong to; every
//                   block of threads keeps the best candidate of each row that it sees.
//   other rows      truncated by top-k or top-p, or drafted from a distribution: several passes,
//                   and an exchange behind most of them. A row has a block of threads to itself.
//   finishing       who adds the last of a request's candidates takes the best of each row,
//                   exchanges those of plain rows with the peers, and accepts drafts.
//
// No block waits for a peer before it has computed all that others may wait for: first the plain
// rows' candidates, then other rows, which all ranks take in the same order, then finishing.
#pragma once

#include <cfloat>

#include "cpu/kernel_table.h"
#include "gpu/elementary.cuh"
#include "gpu/lines.cuh"
#include "vocab_parallel_sample/draws.h"
#include "vocab_parallel_sample/sample_gpu.h"

namespace commfuse::gpu {

constexpr int kSampleThreads = 1024;
constexpr int kSampleWarps = kSampleThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVector = 8;  // logits that a lane reads at once: 16 lanes share a block of tokens
constexpr int kBlock = static_cast<int>(kSampleBlock);
constexpr int kKept = 16;      // blocks of tokens per half warp whose keys are computed together
constexpr int kSegments = 16;  // rows of which a block of threads keeps candidates in the meantime
constexpr int kGroup = 4;      // lanes that share a row when a request is finished
constexpr int kBins = 256;
constexpr int32_t kNobody = 0x7fffffff;
constexpr float kLog2E = 1.44269504f;
// Lines of one source: of each block of threads the rounds of its rows, in two halves; behind them
// what plain rows exchange.
constexpr int64_t kRoundLines = kBins;
constexpr int64_t kRoundBytes = kRoundLines * kLineStride;
constexpr int64_t kPlainOffset = kMaxGrid * 2 * kRoundBytes;
static_assert(kPlainOffset < kLineBytes);
constexpr int64_t kUnitsOfRow = 5;  // key (2) and id; logit and log of the normaliser

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }
__device__ __forceinline__ bool is_finite(double x) { return fabs(x) <= DBL_MAX; }

// ---- logits ------------------------------------------------------------------------------------

template <class T>
constexpr uint32_t kMinusInfinity = std::is_same_v<T, float>    ? 0xff800000u
                                    : std::is_same_v<T, __half> ? 0xfc00u
                                                                : 0xff80u;

// Eight consecutive logits as they lie in memory; -inf beyond the end of a row.
template <class T>
struct Vector8 {
  uint4 unit[sizeof(T) / 2];

  __device__ __forceinline__ void load(const T* p, int valid, bool aligned) {
    if (aligned && valid >= kVector) {
#pragma unroll
      for (size_t i = 0; i < sizeof(T) / 2; ++i)
        unit[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
      return;
    }
    using Bits = std::conditional_t<sizeof(T) == 2, unsigned short, unsigned int>;
    Bits elements[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      elements[i] = i < valid ? reinterpret_cast<const Bits*>(p)[i] : kMinusInfinity<T>;
    }
    memcpy(unit, elements, sizeof(elements));
  }
  __device__ __forceinline__ void floats(float (&x)[kVector]) const {
#pragma unroll
    for (size_t i = 0; i < sizeof(T) / 2; ++i) {
      const uint32_t word[4] = {unit[i].x, unit[i].y, unit[i].z, unit[i].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (std::is_same_v<T, float>) {
          x[4 * i + k] = __uint_as_float(word[k]);
        } else {
          const float2 pair = unpack_pair<T>(word[k]);
          x[2 * k] = pair.x;
          x[2 * k + 1] = pair.y;
        }
      }
    }
  }
};

__device__ __forceinline__ float largest_of(const float (&x)[kVector]) {
  float m = x[0];
#pragma unroll
  for (int i = 1; i < kVector; ++i) m = max_or_nan(m, x[i]);
  return m;
}

__device__ __forceinline__ float weight(float x, float largest, float exponent) {
  return exp2_approximate((x - largest) * exponent);
}

// How a row's token is drawn.
struct RowOptions {
  float scale, exponent;  // 1 / temperature, in powers of e and of 2
  float bound;            // smaller logits are not drawn
  bool greedy;
  uint64_t seed, position;
  Stream stream;
  uint32_t first_block;  // the shard's, in the whole vocabulary

  __device__ Noise noise_of(int block) const {
    return noise(seed, position, stream, first_block + static_cast<uint32_t>(block));
  }
};

// ---- candidates --------------------------------------------------------------------------------

constexpr double kNoKey = -__builtin_huge_val();

// The best block of tokens among some, and the normaliser of all of these.
struct Best {
  double key;
  int32_t block;
  float largest, sum;

  static __device__ Best none() { return {kNoKey, kNobody, -infinity(), 0}; }

  __device__ __forceinline__ void take(double other, int32_t other_block) {
    if (replaces(other, other_block, key, block)) {
      key = other;
      block = other_block;
    }
  }
  __device__ __forceinline__ void add(float other, float other_sum) {
    if (!(other_sum > 0)) return;
    if (!(sum > 0)) {
      largest = other;
      sum = other_sum;
      return;
    }
    const float m = fmaxf(largest, other);
    // No fused operation: both lanes of a pair must get the same bits.
    sum = __fadd_rn(__fmul_rn(sum, weight(largest, m, kLog2E)),
                    __fmul_rn(other_sum, weight(other, m, kLog2E)));
    largest = m;
  }
  // Of the lanes of a warp whose numbers differ in bits below `lanes`, in every one of them.
  template <bool kNormaliser>
  __device__ __forceinline__ void reduce(int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, key, distance);
      const int32_t other_block = __shfl_xor_sync(kAllLanes, block, distance);
      take(other, other_block);
      if constexpr (kNormaliser) {
        const float other_largest = __shfl_xor_sync(kAllLanes, largest, distance);
        const float other_sum = __shfl_xor_sync(kAllLanes, sum, distance);
        add(other_largest, other_sum);
      }
    }
  }
};

// Sums and maxima over the 16 lanes that share a block of tokens.
__device__ __forceinline__ float half_warp_largest(float m) {
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) {
    m = max_or_nan(m, __shfl_xor_sync(kAllLanes, m, distance));
  }
  return m;
}
__device__ __forceinline__ float half_warp_sum(float s) {
#pragma unroll
  for (int distance = 8; distance > 0; distance /= 2) s += __shfl_xor_sync(kAllLanes, s, distance);
  return s;
}

// Weights of the target, all of it or truncated; where a draft is refused, of what the target has
// above the draft's own distribution.
template <bool kTruncated>
struct TargetWeights {
  static constexpr bool kRelativeToBlock = true;
  __device__ __forceinline__ void of(const float (&x)[kVector], int64_t, float largest,
                                     const RowOptions& row, float (&w)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      w[i] = weight(x[i], largest, row.exponent);
      if (kTruncated && !(x[i] >= row.bound)) w[i] = 0;
    }
  }
};
struct ResidualWeights {
  static constexpr bool kRelativeToBlock = false;
  const float* q;
  int64_t columns;
  float largest, per_weight;  // of the row
  __device__ __forceinline__ void of(const float (&x)[kVector], int64_t column, float,
                                     const RowOptions& row, float (&w)[kVector]) const {
    Vector8<float> drafted;
    const int64_t valid = columns - column;
    drafted.load(q + column, valid < kVector ? static_cast<int>(valid) : kVector,
                 reinterpret_cast<uintptr_t>(q + column) % 16 == 0);
    float qs[kVector];
    drafted.floats(qs);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float p = x[i] >= row.bound ? weight(x[i], largest, row.exponent) * per_weight : 0.0f;
      // NaN must survive; beyond the end q is -inf.
      w[i] = i < valid ? max_or_nan(p - qs[i], 0.0f) : 0.0f;
    }
  }
};

// One warp's share of the blocks of tokens first ... first + n of a row: those steps of two blocks
// whose turn it is, when dealing begins with warp `turn`. The result is in every lane.
template <class T, bool kNormaliser, class Weights>
__device__ __forceinline__ Best scan(const T* logits, int64_t columns, int first, int n, int turn,
                                     const RowOptions& row, const Weights& weights) {
  constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int half = lane >> 4, part = lane & 15;
  const int steps = (n + 1) / 2;
  const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  Best best = Best::none();
  int count = 0;
  // Of the count-th block of this half warp: kept by its count-th lane.
  float kept_largest = 0, kept_sum = 0, kept_normaliser = 0;
  int kept_block = 0;

  const auto flush = [&] {
    if (part < count && kept_block < first + n) {
      double key = kept_largest;
      if (!row.greedy && (!Weights::kRelativeToBlock || is_finite(kept_largest))) {
        const double base =
            Weights::kRelativeToBlock ? double{kept_largest} * double{row.scale} : 0.0;
        // A sum that is NaN, as of a draft's distribution, gives a NaN.
        key = kept_sum == 0
                  ? kNoKey
                  : base + std::log(double{kept_sum} / row.noise_of(kept_block).exponential());
      }
      if (key != kNoKey) best.take(key, kept_block);
      if constexpr (kNormaliser) best.add(kept_largest, kept_normaliser);
    }
    count = 0;
  };

  // The next steps' logits are on their way while these are worked on.
  Vector8<T> vectors[kUnroll], next[kUnroll];
  const auto fetch = [&](int j) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int block = first + 2 * (j + u * kSampleWarps) + half;
      const int64_t column = int64_t{block} * kBlock + part * kVector;
      const int64_t valid = block < first + n ? columns - column : 0;
      next[u].load(logits + column, valid < kVector ? static_cast<int>(valid) : kVector, aligned);
    }
  };
  int j = (warp - turn) & (kSampleWarps - 1);
  if (j < steps) fetch(j);
  for (; j < steps; j += kUnroll * kSampleWarps) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) vectors[u] = next[u];
    if (j + kUnroll * kSampleWarps < steps) fetch(j + kUnroll * kSampleWarps);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (j + u * kSampleWarps >= steps) break;
      const int block = first + 2 * (j + u * kSampleWarps) + half;
      float x[kVector], w[kVector];
      vectors[u].floats(x);
      const float m = half_warp_largest(largest_of(x));
      float sum = 0, normaliser = 0;
      if (!row.greedy) {
        const int64_t column = int64_t{block} * kBlock + part * kVector;
        weights.of(x, column, m, row, w);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum += w[i];
        sum = half_warp_sum(sum);
        // Without any weight the largest may be -inf, and the weights NaN.
        if (Weights::kRelativeToBlock && !(m >= row.bound)) sum = 0;
      }
      if constexpr (kNormaliser) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) normaliser += weight(x[i], m, kLog2E);
        normaliser = half_warp_sum(normaliser);
        if (!(m >= kNoBound)) normaliser = 0;
      }
      if (part == count) {
        kept_largest = m;
        kept_sum = sum;
        kept_normaliser = normaliser;
        kept_block = block;
      }
      if (++count == kKept) flush();
    }
  }
  flush();
  best.reduce<kNormaliser>(32);
  return best;
}

// One warp: the token of a block of tokens at which the weights have added up to a fraction of
// their sum, or the first that has the largest logit.
template <class T, class Weights>
__device__ __forceinline__ Candidate token_of(const T* logits, int64_t columns, int64_t vocab_begin,
                                              const Best& best, const RowOptions& row,
                                              const Weights& weights) {
  Candidate found = {best.key, kNobody, -infinity(), best.largest, best.sum};
  if (best.block == kNobody || !is_finite(best.key)) return found;
  const int lane = threadIdx.x & 31;
  const int64_t column = int64_t{best.block} * kBlock + (lane & 15) * kVector;
  const int64_t valid = columns - column;
  Vector8<T> vector;
  vector.load(logits + column, valid < kVector ? static_cast<int>(valid) : kVector,
              reinterpret_cast<uintptr_t>(logits) % 16 == 0);
  float x[kVector], w[kVector];
  vector.floats(x);
  const float m = half_warp_largest(largest_of(x));
  int mine = -1,
      last = -1;  // of this lane's eight: the one that is reached; the last with a weight
  if (row.greedy) {
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) mine = x[i] == m ? i : mine;
  } else {
    weights.of(x, column, m, row, w);
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += w[i];
    double before = sum;  // of the lanes up to this one, of each half warp, which do the same
#pragma unroll
    for (int distance = 1; distance < 16; distance *= 2) {
      const double other = __shfl_up_sync(kAllLanes, before, distance, 16);
      if ((lane & 15) >= distance) before += other;
    }
    const double total = __shfl_sync(kAllLanes, before, 15);
    before -= sum;
    const double wanted = row.noise_of(best.block).second * total;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      before += w[i];
      if (w[i] > 0) {
        last = i;
        if (mine < 0 && before > wanted) mine = i;
      }
    }
  }
  unsigned lanes = __ballot_sync(kAllLanes, mine >= 0) & 0xffffu;
  int source = __ffs(lanes) - 1;
  if (lanes == 0) {
    // Rounding: the fraction was not reached at all.
    lanes = __ballot_sync(kAllLanes, last >= 0) & 0xffffu;
    source = 31 - __clz(lanes);
    mine = last;
  }
  float logit = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) logit = i == mine ? x[i] : logit;
  const int index = __shfl_sync(kAllLanes, mine, source);
  found.logit = __shfl_sync(kAllLanes, logit, source);
  found.id =
      static_cast<int32_t>(vocab_begin + int64_t{best.block} * kBlock + source * kVector + index);
  return found;
}

// ---- requests and their rows -------------------------------------------------------------------

struct Shared {
  // Of this launch's requests: first row, first plain row, first other row; one more behind them.
  int32_t row_begin[kMaxRequests + 1];
  int32_t plain_begin[kMaxRequests + 1];
  unsigned long long warp_totals[kSampleWarps];
  int32_t rows_before;  // of the requests before this launch's
  Best best[kSegments][kSampleWarps];
  // Of another row.
  unsigned long long histogram[kBins];
  uint2 packs[kMaxRanks][4];
  unsigned long long total;
  unsigned long long target;
  float warp_largest[kSampleWarps];
  uint32_t prefix;
  bool found;
  Candidate winner;
};

// Which rows of a request can be drawn in one pass.
struct Kind {
  bool sampled, truncated, distributed;

  __device__ Kind(const Draws& draws, int64_t request) {
    sampled = draws.temperature && __ldg(draws.temperature + request) != 0;
    truncated = sampled && (__ldg(draws.top_k + request) > 0 || __ldg(draws.top_p + request) < 1);
    // Not by the pointer, which is null where a rank has no columns: ranks must agree.
    distributed = sampled && draws.draft_rows > 0;
  }
  __device__ int plain_rows(int rows) const { return truncated ? 0 : distributed ? 1 : rows; }
};

__device__ __forceinline__ int rows_of(const Draws& draws, int64_t request) {
  if (!draws.draft_lengths) return 1;
  const int64_t length = __ldg(draws.draft_lengths + request);
  return 1 + static_cast<int>(length < 0 ? 0 : length < draws.longest ? length : draws.longest);
}

__device__ __forceinline__ RowOptions options_of(const Draws& draws, int64_t request, int row) {
  RowOptions options = {1, kLog2E, kNoBound,     true,
                        0, 0,      draws.stream, static_cast<uint32_t>(draws.vocab_begin / kBlock)};
  if (!draws.temperature) return options;
  const double temperature = __ldg(draws.temperature + request);
  if (temperature == 0) return options;
  options.greedy = false;
  options.scale = static_cast<float>(1 / temperature);
  options.exponent = options.scale * kLog2E;
  options.seed = static_cast<uint64_t>(__ldg(draws.seed + request));
  options.position = static_cast<uint64_t>(__ldg(draws.position + request) + row);
  return options;
}

// How many blocks of tokens come before each block of threads: as even as possible.
struct Dealing {
  int each, more;  // the first `more` have one more

  __device__ Dealing(int blocks, int grid) : each(blocks / grid), more(blocks % grid) {}
  __device__ int begin(int block) const { return block * each + (block < more ? block : more); }
  __device__ int owner(int at) const {
    const int cut = more * (each + 1);
    return at < cut ? at / (each + 1) : more + (at - cut) / each;
  }
};

template <int kWorld>
class Sampler {
 public:
  __device__ Sampler(const Draws& draws, const Workspace& workspace, const Exchange& exchange,
                     Shared& shared)
      : d_(draws),
        w_(workspace),
        exchange_(exchange),
        s_(shared),
        lane_(threadIdx.x & 31),
        warp_(threadIdx.x >> 5),
        per_row_(static_cast<int>((draws.columns + kBlock - 1) / kBlock)),
        dealing_(1, 1) {
    // A rank without columns takes part as one whose logits are all -inf.
    if (per_row_ == 0) per_row_ = 1;
  }

  // The block: where each request's rows begin.
  __device__ void find_rows() {
    const int count = static_cast<int>(d_.count);
    int before = 0;
    for (int64_t r = threadIdx.x; r < d_.begin; r += kSampleThreads) before += rows_of(d_, r);
    unsigned long long mine = 0;
    if (threadIdx.x < d_.count) {
      const int64_t request = d_.begin + threadIdx.x;
      const int rows = rows_of(d_, request);
      const Kind kind(d_, request);
      mine = static_cast<unsigned long long>(rows) << 32 |
             static_cast<unsigned>(kind.plain_rows(rows));
      if (d_.draft_lengths && rows - 1 != __ldg(d_.draft_lengths + request) && blockIdx.x == 0) {
        report(request, 0, RowProblem::length);
      }
    }
    if (threadIdx.x == 0) s_.rows_before = 0;
    unsigned long long sum = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane_ >= distance) sum += other;
    }
    if (lane_ == 31) s_.warp_totals[warp_] = sum;
    __syncthreads();
    if (before) atomicAdd(&s_.rows_before, before);
    unsigned long long total = s_.warp_totals[lane_];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(kAllLanes, total, distance);
      if (lane_ >= distance) total += other;
    }
    const unsigned long long earlier = __shfl_sync(kAllLanes, total, (warp_ + 31) & 31);
    if (warp_ > 0) sum += earlier;
    if (static_cast<int>(threadIdx.x) < count) {
      s_.row_begin[threadIdx.x + 1] = static_cast<int32_t>(sum >> 32);
      s_.plain_begin[threadIdx.x + 1] = static_cast<int32_t>(sum & 0xffffffffu);
    }
    if (threadIdx.x == 0) s_.row_begin[0] = s_.plain_begin[0] = 0;
    __syncthreads();
    plain_ = s_.plain_begin[count];
    others_ = s_.row_begin[count] - plain_;
    dealing_ = Dealing(plain_ * per_row_, gridDim.x);
    begin_ = dealing_.begin(blockIdx.x);
    end_ = dealing_.begin(blockIdx.x + 1);
    if (s_.rows_before + s_.row_begin[count] > d_.rows && blockIdx.x == 0 && threadIdx.x == 0) {
      report(d_.begin + count - 1, 0, RowProblem::length);
    }
  }

  // The block: candidates of plain rows.
  template <class T>
  __device__ void scan_plain_rows() {
    int at = begin_, row = begin_ / per_row_, request = at < end_ ? request_of_plain(row) : 0;
    while (at < end_) {
      const int round_row = row, round_request = request;
      int segments = 0, turn = 0;
      for (; segments < kSegments && at < end_; ++segments) {
        while (s_.plain_begin[request + 1] <= row) ++request;
        const int index = plain_index(request, row);
        const int first = at - row * per_row_;
        const int n = min(per_row_ - first, end_ - at);
        const RowOptions options = options_of(d_, d_.begin + request, index);
        const T* logits = logits_of<T>(request, index);
        const TargetWeights<false> weights;
        const Best best =
            d_.log_probabilities
                ? scan<T, true>(logits, d_.columns, first, n, turn, options, weights)
                : scan<T, false>(logits, d_.columns, first, n, turn, options, weights);
        if (lane_ == 0) s_.best[segments][warp_] = best;
        turn += (n + 1) / 2;
        at += n;
        row += first + n == per_row_;
      }
      __syncthreads();
      for (int segment = warp_; segment < segments; segment += kSampleWarps) {
        const int own_row = round_row + segment;
        int own = round_request;
        while (s_.plain_begin[own + 1] <= own_row) ++own;
        const int index = plain_index(own, own_row);
        Best best = s_.best[segment][lane_];
        best.reduce<true>(32);
        const RowOptions options = options_of(d_, d_.begin + own, index);
        const Candidate found = token_of(logits_of<T>(own, index), d_.columns, d_.vocab_begin, best,
                                         options, TargetWeights<false>{});
        // Counted by rows and blocks, no two candidates have the same place.
        if (lane_ == 0) d_.candidates[own_row + blockIdx.x] = found;
      }
      __syncthreads();
    }
  }

  // The block: other rows, its share of them. False: a failure.
  template <class T>
  __device__ bool draw_other_rows() {
    for (int other = blockIdx.x; other < others_; other += gridDim.x) {
      const int request = request_of_other(other);
      if (!draw<T>(request, other - other_begin(request))) return false;
      if (threadIdx.x == 0) d_.candidates[plain_ + gridDim.x + other] = s_.winner;
      __syncthreads();
    }
    return true;
  }

  // Warp by warp: counts this block's candidates; whoever adds a request's last one finishes it.
  __device__ bool finish_requests() {
    bool good = true;
    if (begin_ < end_) {
      const int first_row = begin_ / per_row_, last_row = (end_ - 1) / per_row_;
      const int first = request_of_plain(first_row), last = request_of_plain(last_row);
      for (int request = first + warp_; request <= last; request += kSampleWarps) {
        const int from = max(first_row, s_.plain_begin[request]);
        const int to = min(last_row + 1, s_.plain_begin[request + 1]);
        if (from < to && arrive(request, to - from)) good &= finish(request);
      }
    }
    int turn = 0;
    for (int other = blockIdx.x; other < others_; other += gridDim.x, ++turn) {
      if (turn % kSampleWarps != warp_) continue;
      const int request = request_of_other(other);
      if (arrive(request, 1)) good &= finish(request);
    }
    return good;
  }

 private:
  // Searches begin[0 ... count] for the request to which an index belongs.
  template <class Begin>
  __device__ int search(int index, Begin begin) const {
    int low = 0, high = static_cast<int>(d_.count);
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (begin(middle) <= index ? low : high) = middle;
    }
    return low;
  }
  __device__ int request_of_plain(int row) const {
    // Of requests without plain rows, which begin at the same place, the last is found: it is the
    // one that has them.
    return search(row, [&](int r) { return s_.plain_begin[r]; });
  }
  __device__ int other_begin(int request) const {
    return s_.row_begin[request] - s_.plain_begin[request];
  }
  __device__ int request_of_other(int other) const {
    return search(other, [&](int r) { return other_begin(r); });
  }
  __device__ int rows(int request) const {
    return s_.row_begin[request + 1] - s_.row_begin[request];
  }
  __device__ int plain_rows(int request) const {
    return s_.plain_begin[request + 1] - s_.plain_begin[request];
  }
  // A request's plain rows are its last ones, and its others the first.
  __device__ int plain_index(int request, int row) const {
    return rows(request) - plain_rows(request) + row - s_.plain_begin[request];
  }

  __device__ int64_t row_index(int request, int row) const {
    const int64_t index = int64_t{s_.rows_before} + s_.row_begin[request] + row;
    // More rows than there are have been reported; nothing may be read beyond them.
    return index < d_.rows ? index : d_.rows - 1;
  }
  template <class T>
  __device__ const T* logits_of(int request, int row) const {
    return static_cast<const T*>(d_.logits) + row_index(request, row) * d_.columns;
  }

  __device__ void report(int64_t request, int64_t row, RowProblem problem) const {
    const uint64_t packed = RowReport::pack(request, row, d_.op, problem);
    auto* word = reinterpret_cast<unsigned long long*>(w_.base[w_.rank] + kRowReport);
    auto* host = reinterpret_cast<volatile unsigned long long*>(d_.report);
    atomicMax(word, static_cast<unsigned long long>(packed));
    // Several may report at once: the earliest row's must be what the host sees in the end.
    for (;;) {
      const unsigned long long worst = atomicMax(word, 0ull);
      *host = worst;
      __threadfence_system();
      if (atomicMax(word, 0ull) == worst) break;
    }
  }

  // ---- other rows ----

  // f(logits, column, how many of them are) for every eight logits of the shard.
  template <class T, class F>
  __device__ void for_logits(const T* logits, F f) const {
    const bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
    constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2;
    for (int64_t base = threadIdx.x * kVector; base < d_.columns;
         base += kUnroll * kSampleThreads * kVector) {
      Vector8<T> vectors[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t column = base + u * kSampleThreads * kVector;
        const int64_t valid = d_.columns - column;
        vectors[u].load(logits + column,
                        valid <= 0        ? 0
                        : valid < kVector ? static_cast<int>(valid)
                                          : kVector,
                        aligned);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        float x[kVector];
        vectors[u].floats(x);
        f(x);
      }
    }
  }

  // The block: thread t < n puts a pack; take(t, source, pack) sees everybody's, in rank order.
  template <class Take>
  __device__ bool exchange(int n, uint2 mine, Take take) {
    bool failed = false;
    const int t = threadIdx.x;
    if constexpr (kWorld == 1) {
      if (t < n) take(t, 0, mine);
    } else {
      if (t < n) {
        const int64_t at = (blockIdx.x * 2 + (round_ & 1)) * kRoundBytes + t * kLineStride;
        const int rank = exchange_.rank(), world = exchange_.world();
#pragma unroll
        for (int p = 0; p < kWorld; ++p) {
          if (p < world && p != rank) {
            put_line(exchange_.lines(p, rank) + at, mine, exchange_.flag());
          }
        }
        Line lines[kWorld];
        failed = !take_from_peers<kWorld>(
            exchange_, 0, [&](int s) { return exchange_.lines(rank, s) + at; }, lines);
        if (!failed) {
#pragma unroll
          for (int s = 0; s < kWorld; ++s) {
            if (s < world) take(t, s, s == rank ? mine : lines[s].pack());
          }
        }
        // R14: the lines of this round are empty before anything of the next one is seen, and a
        // peer that has seen it may write here in the one after that.
        __threadfence_system();
      }
      ++round_;
    }
    return !__syncthreads_or(failed);
  }
  static __device__ uint2 pack_of(double x) {
    return pack_of(static_cast<unsigned long long>(__double_as_longlong(x)));
  }
  static __device__ uint2 pack_of(unsigned long long x) {
    return {static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32)};
  }
  static __device__ unsigned long long word_of(uint2 pack) {
    return static_cast<unsigned long long>(pack.y) << 32 | pack.x;
  }

  __device__ float block_largest(float m) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      m = max_or_nan(m, __shfl_xor_sync(kAllLanes, m, distance));
    }
    if (lane_ == 0) s_.warp_largest[warp_] = m;
    __syncthreads();
    m = s_.warp_largest[lane_];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      m = max_or_nan(m, __shfl_xor_sync(kAllLanes, m, distance));
    }
    __syncthreads();
    return m;
  }
  // Into s_.total, which must be zero; visible after a barrier.
  __device__ void add_to_total(unsigned long long x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      x += __shfl_xor_sync(kAllLanes, x, distance);
    }
    if (lane_ == 0) atomicAdd(&s_.total, x);
  }

  // The least logit at or above which lie top_k tokens, or top_p of the mass: looked for among
  // distances from the largest logit, in the order of the numbers' bits. The first histogram has a
  // bin for each of the 255 nearest distances in bfloat16, about two powers of two, where the bound
  // almost always is; few logits come to it. If it is not there, all 32 bits are looked through,
  // eight at a time.
  template <class T>
  __device__ bool find_bound(const T* logits, float largest, int64_t top_k, double top_p,
                             bool by_mass, RowOptions& row) {
    constexpr int kFinest = std::is_same_v<T, float> ? 0 : std::is_same_v<T, __half> ? 8 : 16;
    const uint32_t top = key_of(largest);
    bool window = true;
    int shift = 16;
    uint32_t prefix = 0;
    unsigned long long target = 0;
    for (;;) {
      if (threadIdx.x < kBins) s_.histogram[threadIdx.x] = 0;
      if (threadIdx.x == 0) s_.total = 0;
      __syncthreads();
      unsigned long long total = 0;
      for_logits(logits, [&](const float (&x)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (!(x[i] >= row.bound)) continue;
          const uint32_t distance = top - key_of(x[i]);
          const unsigned long long mass = by_mass ? fixed(weight(x[i], largest, row.exponent)) : 1;
          if (window) {
            total += mass;
            if (distance >> 16 >= kBins - 1) continue;
          } else if (shift < 24 && distance >> (shift + 8) != prefix) {
            continue;
          }
          if (mass) atomicAdd(&s_.histogram[distance >> shift & (kBins - 1)], mass);
        }
      });
      if (window) add_to_total(total);
      __syncthreads();
      if (window && threadIdx.x == 0) s_.histogram[kBins - 1] = s_.total;
      __syncthreads();
      unsigned long long sum = 0;
      const unsigned long long mine = threadIdx.x < kBins ? s_.histogram[threadIdx.x] : 0;
      if (!exchange(kBins, pack_of(mine), [&](int, int, uint2 pack) { sum += word_of(pack); })) {
        return false;
      }
      if (threadIdx.x < kBins) s_.histogram[threadIdx.x] = sum;
      __syncthreads();
      if (window) {
        const unsigned long long all = s_.histogram[kBins - 1];
        target = by_mass ? wanted_mass(top_p, all) : wanted_tokens(top_k, all);
      }
      if (warp_ == 0) find_bin(target, window ? kBins - 1 : kBins);
      __syncthreads();
      const bool found = s_.found;
      const uint32_t bin = s_.prefix;
      const unsigned long long left = s_.target;
      __syncthreads();
      if (window && !found) {
        window = false;
        shift = 24;
        continue;
      }
      window = false;
      prefix = prefix << 8 | bin;
      target = left;
      if (shift <= kFinest) break;
      shift -= 8;
    }
    // The last of the distances that the bits found stand for: narrow types have no other there.
    const uint32_t distance = prefix << shift | ((1u << shift) - 1);
    row.bound = fmaxf(row.bound, value_of(distance < top ? top - distance : 0));
    return true;
  }
  // Warp 0: the bin with which the sum reaches the target.
  __device__ void find_bin(unsigned long long target, int bins) {
    constexpr int kEach = kBins / 32;
    unsigned long long own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int bin = lane_ * kEach + i;
      if (bin < bins) own += s_.histogram[bin];
    }
    unsigned long long sum = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane_ >= distance) sum += other;
    }
    const unsigned reached = __ballot_sync(kAllLanes, sum >= target);
    if (lane_ == 0) s_.found = reached != 0;
    if (reached == 0 || lane_ != __ffs(reached) - 1) return;
    unsigned long long left = target - (sum - own);
    int bin = lane_ * kEach;
    for (; s_.histogram[bin] < left; ++bin) left -= s_.histogram[bin];
    s_.prefix = static_cast<uint32_t>(bin);
    s_.target = left;
  }

  // The block: the best of all ranks' candidates for a row. False: a failure.
  template <class T, class Weights>
  __device__ __noinline__ bool choose(const T* logits, const RowOptions& row,
                                      const Weights& weights, Candidate* winner) {
    Best best = scan<T, false>(logits, d_.columns, 0, per_row_, 0, row, weights);
    __syncthreads();  // nobody still reads what the last row's warps have found
    if (lane_ == 0) s_.best[0][warp_] = best;
    __syncthreads();
    Candidate own = {kNoKey, kNobody, -infinity(), 0, 0};
    if (warp_ == 0) {
      best = s_.best[0][lane_];
      best.reduce<false>(32);
      own = token_of(logits, d_.columns, d_.vocab_begin, best, row, weights);
    }
    const uint2 packs[2] = {pack_of(own.key),
                            {static_cast<uint32_t>(own.id), __float_as_uint(own.logit)}};
    if (!exchange(2, packs[threadIdx.x & 1],
                  [&](int t, int source, uint2 pack) { s_.packs[source][t] = pack; })) {
      return false;
    }
    *winner = {kNoKey, kNobody, -infinity(), 0, 0};
    for (int source = 0; source < (kWorld == 1 ? 1 : exchange_.world()); ++source) {
      const double key = __longlong_as_double(word_of(s_.packs[source][0]));
      const int32_t id = static_cast<int32_t>(s_.packs[source][1].x);
      if (!replaces(key, id, winner->key, winner->id)) continue;
      winner->key = key;
      winner->id = id;
      winner->logit = __uint_as_float(s_.packs[source][1].y);
    }
    return true;
  }

  // The block: one row that takes several passes; its token goes to s_.winner.
  template <class T>
  __device__ __noinline__ bool draw(int request, int index) {
    const int64_t global = d_.begin + request;
    const Kind kind(d_, global);
    const T* logits = logits_of<T>(request, index);
    RowOptions row = options_of(d_, global, index);
    const bool drafted = kind.distributed && index < rows(request) - 1;
    int64_t draft = -1;
    const float* q = nullptr;
    if (drafted) {
      draft = d_.drafts[global * d_.longest + index];
      // Every request before this one has one row more than drafts.
      const int64_t at = int64_t{s_.rows_before} + s_.row_begin[request] + index - global;
      q = d_.draft_probabilities + (at < d_.draft_rows ? at : d_.draft_rows - 1) * d_.columns;
    }

    float largest = -infinity();
    for_logits(logits,
               [&](const float (&x)[kVector]) { largest = max_or_nan(largest, largest_of(x)); });
    largest = block_largest(largest);
    float draft_logit = -infinity(), draft_probability = 0;
    const int64_t own = draft - d_.vocab_begin;
    if (drafted && own >= 0 && own < d_.columns) {
      Vector8<T> vector;
      vector.load(logits + own, 1, false);
      float x[kVector];
      vector.floats(x);
      draft_logit = x[0];
      draft_probability = q[own];
    }
    {
      const uint2 packs[2] = {{__float_as_uint(largest), __float_as_uint(draft_logit)},
                              {__float_as_uint(draft_probability), 0}};
      if (!exchange(2, packs[threadIdx.x & 1],
                    [&](int t, int source, uint2 pack) { s_.packs[source][t] = pack; })) {
        return false;
      }
      for (int source = 0; source < (kWorld == 1 ? 1 : exchange_.world()); ++source) {
        largest = max_or_nan(largest, __uint_as_float(s_.packs[source][0].x));
        draft_logit = max_or_nan(draft_logit, __uint_as_float(s_.packs[source][0].y));
        draft_probability = max_or_nan(draft_probability, __uint_as_float(s_.packs[source][1].x));
      }
    }
    Candidate winner = {largest, kNobody, -infinity(), 0, 0};
    if (!is_finite(largest)) {
      if (threadIdx.x == 0) s_.winner = winner;
      __syncthreads();
      return true;
    }

    const int64_t top_k = d_.top_k[global];
    const double top_p = d_.top_p[global];
    if (top_k > 0 && !find_bound(logits, largest, top_k, top_p, false, row)) return false;
    if (top_p < 1 && !find_bound(logits, largest, top_k, top_p, true, row)) return false;

    unsigned long long mass = 0;
    bool accepted = false;
    if (drafted) {
      if (threadIdx.x == 0) s_.total = 0;
      __syncthreads();
      unsigned long long part = 0;
      for_logits(logits, [&](const float (&x)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (x[i] >= row.bound) part += fixed(weight(x[i], largest, row.exponent));
        }
      });
      add_to_total(part);
      __syncthreads();
      const unsigned long long own_mass = s_.total;
      unsigned long long sum = 0;
      if (!exchange(1, pack_of(own_mass), [&](int, int, uint2 pack) { sum += word_of(pack); })) {
        return false;
      }
      if (threadIdx.x == 0) s_.total = sum;
      __syncthreads();
      mass = s_.total;
      accepted = accepts(draft_logit, draft_probability, largest, row.bound, row.scale, mass,
                         row.seed, row.position);
    }

    if (!accepted) {
      const ResidualWeights residual = {q, d_.columns, largest,
                                        static_cast<float>(kOne / static_cast<double>(mass))};
      if (!(drafted ? choose(logits, row, residual, &winner)
                    : choose(logits, row, TargetWeights<true>{}, &winner))) {
        return false;
      }
      if (drafted && winner.key != winner.key && threadIdx.x == 0) {
        report(global, index, RowProblem::draft_nan);
      }
      // Where the target has nothing above the draft's distribution the two are the same, and the
      // draft was refused by rounding, or because it is no token.
      if (drafted && winner.key == kNoKey && !choose(logits, row, TargetWeights<true>{}, &winner)) {
        return false;
      }
    }
    if (accepted) winner = {0, static_cast<int32_t>(draft), draft_logit, 0, 0};

    if (d_.log_probabilities) {
      // Lanes and warps add in a fixed order; ranks in theirs.
      Best sum = {kNoKey, kNobody, largest, 0};
      for_logits(logits, [&](const float (&x)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum.sum += weight(x[i], largest, kLog2E);
      });
      sum.reduce<true>(32);
      __syncthreads();
      if (lane_ == 0) s_.best[0][warp_] = sum;
      __syncthreads();
      sum = s_.best[0][lane_];
      sum.reduce<true>(32);
      double all = 0;
      if (!exchange(1, pack_of(double{sum.sum}),
                    [&](int, int, uint2 pack) { all += __longlong_as_double(word_of(pack)); })) {
        return false;
      }
      winner.largest = largest;
      winner.sum = static_cast<float>(all);
    }
    if (threadIdx.x == 0) s_.winner = winner;
    __syncthreads();
    return true;
  }

  // ---- finishing ----

  // A warp: adds n candidates of a request; whether they were the last.
  __device__ bool arrive(int request, int n) {
    int expected = 0;
    for (int row = s_.plain_begin[request] + lane_; row < s_.plain_begin[request + 1]; row += 32) {
      expected += blocks_of(row);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      expected += __shfl_xor_sync(kAllLanes, expected, distance);
    }
    expected += rows(request) - plain_rows(request);
    int before = 0;
    if (lane_ == 0) {
      auto* ticket = reinterpret_cast<uint32_t*>(w_.base[w_.rank] + kTickets) + request;
      // Releases this block's candidates, which a barrier has put before it, and acquires those of
      // the blocks that came earlier.
      before = static_cast<int>(add_acquire_release(ticket, static_cast<uint32_t>(n)));
      if (before + n == expected) *ticket = 0;  // for the next call
    }
    before = __shfl_sync(kAllLanes, before, 0);
    return before + n == expected;
  }
  // Blocks of threads that share a plain row.
  __device__ int blocks_of(int row) const {
    return dealing_.owner((row + 1) * per_row_ - 1) - dealing_.owner(row * per_row_) + 1;
  }

  static __device__ Candidate load(const Candidate* from) {
    Candidate candidate;
    candidate.key = __ldcg(&from->key);
    candidate.id = __ldcg(&from->id);
    candidate.logit = __ldcg(&from->logit);
    candidate.largest = __ldcg(&from->largest);
    candidate.sum = __ldcg(&from->sum);
    return candidate;
  }
  static __device__ void keep_better(Candidate& mine, const Candidate& other) {
    if (replaces(other.key, other.id, mine.key, mine.id)) {
      mine.key = other.key;
      mine.id = other.id;
      mine.logit = other.logit;
    }
  }
  static __device__ void add_normaliser(Candidate& mine, const Candidate& other) {
    Best sum = {kNoKey, kNobody, mine.largest, mine.sum};
    sum.add(other.largest, other.sum);
    mine.largest = sum.largest;
    mine.sum = sum.sum;
  }
  // Over the lanes that share a row; with both, every lane has the same bits.
  __device__ void reduce_group(Candidate& mine) const {
#pragma unroll
    for (int distance = kGroup / 2; distance > 0; distance /= 2) {
      Candidate other;
      other.key = __shfl_xor_sync(kAllLanes, mine.key, distance);
      other.id = __shfl_xor_sync(kAllLanes, mine.id, distance);
      other.logit = __shfl_xor_sync(kAllLanes, mine.logit, distance);
      other.largest = __shfl_xor_sync(kAllLanes, mine.largest, distance);
      other.sum = __shfl_xor_sync(kAllLanes, mine.sum, distance);
      keep_better(mine, other);
      add_normaliser(mine, other);
    }
  }

  // The lanes of a group: the best of all ranks' for a plain row; the peers' come in turn to the
  // lanes. False: a failure.
  template <int kUnits>
  __device__ bool exchange_group(int plain_row, bool mine, Candidate& best) const {
    const int rank = exchange_.rank(), world = exchange_.world();
    const int part = lane_ % kGroup;
    const uint32_t flag = exchange_.flag();
    const uint2 key = pack_of(best.key);
    const float normaliser =
        kUnits > 3 ? best.largest + logf(best.sum) : 0.0f;  // -inf where the sum is 0
    const uint32_t data[5] = {key.x, key.y, static_cast<uint32_t>(best.id),
                              __float_as_uint(best.logit), __float_as_uint(normaliser)};
    const int64_t place = kPlainOffset + int64_t{plain_row} * kUnits * 8;
    constexpr int kSources = kMaxRanks / kGroup;
    char* address[kUnits * kSources];
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      const int peer = part + i * kGroup;
      const bool there = mine && peer < world && peer != rank;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (there) put_unit(exchange_.lines(peer, rank) + place + u * 8, data[u], flag);
        address[i * kUnits + u] = there ? exchange_.lines(rank, peer) + place + u * 8 : nullptr;
      }
    }
    uint32_t units[kUnits * kSources];
    const bool good = take_units<kUnits * kSources>(
        exchange_, 0, address, [&](int i) { return part + i / kUnits * kGroup; }, units);
    Candidate merged = {kNoKey, kNobody, -infinity(), -infinity(), 0};
#pragma unroll
    for (int i = 0; i < kSources; ++i) {
      const int source = part + i * kGroup;
      if (!mine || source >= world) continue;
      Candidate other;
      const uint32_t* from = source == rank ? data : units + i * kUnits;
      other.key = __longlong_as_double(word_of({from[0], from[1]}));
      other.id = static_cast<int32_t>(from[2]);
      other.logit = other.largest = -infinity();
      other.sum = 0;
      if constexpr (kUnits > 3) {
        other.logit = __uint_as_float(from[3]);
        other.largest = __uint_as_float(from[4]);
        other.sum = other.largest == -infinity() ? 0.0f : 1.0f;
      }
      keep_better(merged, other);
      add_normaliser(merged, other);
    }
    reduce_group(merged);
    best = merged;
    return __all_sync(kAllLanes, good);
  }

  // A warp: the tokens of a request whose candidates are all there. Groups of lanes take a row
  // each.
  __device__ __noinline__ bool finish(int request) {
    constexpr int kRows = 32 / kGroup;
    const int64_t global = d_.begin + request;
    const int count = rows(request), others = count - plain_rows(request);
    const int group = lane_ / kGroup, part = lane_ % kGroup;
    const int64_t out = global * (d_.longest + 1);
    bool going = true, good = true;
    for (int base = 0; base < count; base += kRows) {
      const int row = base + group;
      const bool valid = row < count, plain = valid && row >= others;
      const int plain_row = s_.plain_begin[request] + row - others;
      Candidate best = {kNoKey, kNobody, -infinity(), -infinity(), 0};
      if (plain) {
        const int first = dealing_.owner(plain_row * per_row_);
        const int blocks = blocks_of(plain_row);
#pragma unroll 4
        for (int i = part; i < blocks; i += kGroup) {
          const Candidate other = load(d_.candidates + plain_row + first + i);
          keep_better(best, other);
          add_normaliser(best, other);
        }
      }
      reduce_group(best);
      if constexpr (kWorld > 1) {
        good &= d_.log_probabilities ? exchange_group<5>(plain_row, plain, best)
                                     : exchange_group<3>(plain_row, plain, best);
      }
      if (valid && !plain) {
        best = load(d_.candidates + plain_ + gridDim.x + other_begin(request) + row);
      }
      const bool found = valid && is_finite(best.key);
      if (valid && !found && part == 0 && good) {
        report(global, row,
               best.key != best.key ? RowProblem::nan
               : best.key > 0       ? RowProblem::infinite
                                    : RowProblem::nothing);
      }
      const int64_t token = found ? best.id : -1;
      const bool right = found && row < count - 1 && d_.draft_lengths &&
                         token == d_.drafts[global * d_.longest + row];
      constexpr unsigned kFirstLanes = 0x11111111u;
      static_assert(kGroup == 4);
      const unsigned wrong = ~__ballot_sync(kAllLanes, right) & kFirstLanes;
      const int last =
          wrong ? (__ffs(wrong) - 1) / kGroup : kRows;  // the first that is not a draft
      if (valid && part == 0) {
        const bool kept = going && group <= last;
        d_.tokens[out + row] = kept ? token : -1;
        if (d_.log_probabilities) {
          d_.log_probabilities[out + row] =
              kept && found ? static_cast<float>(double{best.logit} - best.largest -
                                                 std::log(double{best.sum}))
                            : 0.0f;
        }
        if (going && group == last && d_.accepted) d_.accepted[global] = row;
      }
      going &= wrong == 0;
    }
    for (int64_t row = count + lane_; row <= d_.longest; row += 32) {
      d_.tokens[out + row] = -1;
      if (d_.log_probabilities) d_.log_probabilities[out + row] = 0;
    }
    return good;
  }

  const Draws& d_;
  const Workspace& w_;
  const Exchange& exchange_;
  Shared& s_;
  int lane_, warp_;
  int per_row_;                 // blocks of tokens
  int plain_ = 0, others_ = 0;  // rows
  Dealing dealing_;
  int begin_ = 0, end_ = 0;  // this block's blocks of tokens
  int round_ = 0;            // exchanges of this block
};

template <class T, int kWorld>
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const __grid_constant__ Workspace workspace,
                  const __grid_constant__ Announcement announcement,
                  const __grid_constant__ Draws draws) {
  __shared__ Shared shared;
  Exchange exchange(workspace, blockIdx.x, gridDim.x);
  wait_for_predecessor();
  if constexpr (kWorld > 1) {
    if (!exchange.begin_block()) return;
    if (blockIdx.x == 0) exchange.announce_with_word(announcement);
  }
  Sampler<kWorld> sampler(draws, workspace, exchange, shared);
  sampler.find_rows();
  sampler.template scan_plain_rows<T>();
  if constexpr (kWorld > 1) {
    // Before anything is awaited that a peer which calls something else may never send.
    if (blockIdx.x == 0 && __syncthreads_or(!exchange.await_words(announcement.tag))) return;
  }
  if (!sampler.template draw_other_rows<T>()) return;
  const bool good = sampler.finish_requests();
  if constexpr (kWorld > 1) {
    if (__syncthreads_or(!good)) return;
    exchange.finish();
  }
}

}  // namespace commfuse::gpu
