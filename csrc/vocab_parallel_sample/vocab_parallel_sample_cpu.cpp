#include <algorithm>
#include <cmath>
#include <limits>

#include "vocab_parallel_sample/draws.h"
#include "vocab_parallel_sample/exchange_rows.h"
#include "vocab_parallel_sample/sample.h"

namespace commfuse {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBins = 256;

// Leading bytes of a key in which two logits of the dtype can differ.
int digits_of(DType dtype) {
  return dtype == DType::bfloat16 ? 2 : dtype == DType::float16 ? 3 : 4;
}

void keep_larger(float& mine, float theirs) {
  // NaN must survive whichever side it comes from.
  if (std::isnan(theirs) || theirs > mine) mine = theirs;
}

struct Maximum {
  float largest;
  float draft_logit = -kInfinity, draft_probability = 0;  // of the rank that holds the draft
};

struct Winner {
  double key = -std::numeric_limits<double>::infinity();
  int32_t id = std::numeric_limits<int32_t>::max();
  float logit = -kInfinity;
};
static_assert(sizeof(Winner) == 16);

// Of softmax(logits): sum of e^(x - largest).
struct Normaliser {
  float largest = -kInfinity;
  float padding = 0;
  double sum = 0;
};

void add_normaliser(Normaliser& mine, const Normaliser& theirs) {
  if (theirs.sum == 0) return;
  if (mine.sum == 0) {
    mine = theirs;
    return;
  }
  const float largest = std::max(mine.largest, theirs.largest);
  mine.sum = mine.sum * std::exp(double{mine.largest} - largest) +
             theirs.sum * std::exp(double{theirs.largest} - largest);
  mine.largest = largest;
}

class Sampler {
 public:
  Sampler(Communicator& communicator, Op op, Stream stream, const at::Tensor& logits,
          int64_t vocab_begin, const std::vector<SampleRow>& rows, bool log_probabilities)
      : communicator_(communicator),
        stream_(stream),
        dtype_(dtype_of_tensor(logits, "logits")),
        data_(static_cast<const std::byte*>(logits.const_data_ptr())),
        columns_(logits.size(1)),
        vocab_begin_(vocab_begin),
        rows_(rows),
        states_(rows.size()),
        log_probabilities_(log_probabilities) {
    uint32_t variant = log_probabilities ? 1 : 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].truncated()) variant |= 2;
      if (rows[i].drafted) variant |= 4;
    }
    const int64_t batch = rows.empty() ? 0 : rows.back().request + 1;
    descriptor_ = describe(op, dtype_, {static_cast<int64_t>(rows.size()), batch}, variant);
  }

  void run(int64_t* tokens, float* log_probabilities) {
    find_maxima();
    truncate(false);
    truncate(true);
    find_masses();
    std::vector<Winner> winners = choose();
    replace_without_residual(winners);
    const std::vector<Normaliser> normalisers = normalise();
    for (size_t i = 0; i < rows_.size(); ++i) {
      const SampleRow& row = rows_[i];
      const State& state = states_[i];
      if (uses_draft(row) && std::isnan(winners[i].key)) throw draft_nan(place(row));
      if (!state.accepted) require_token(row, winners[i].key);
      tokens[i] = state.accepted ? row.draft : winners[i].id;
      if (log_probabilities) {
        const float logit = state.accepted ? state.draft_logit : winners[i].logit;
        log_probabilities[i] = static_cast<float>(double{logit} - normalisers[i].largest -
                                                  std::log(normalisers[i].sum));
      }
    }
  }

 private:
  struct Entry {
    uint32_t key;
    uint64_t mass;
  };
  struct State {
    float largest = 0;       // of the row, on all ranks
    float bound = kNoBound;  // tokens with smaller logits are not drawn
    uint64_t mass = 0;       // of what may be drawn, on all ranks
    float draft_logit = 0, draft_probability = 0;
    bool accepted = false;  // the draft
    // While a bound is looked for: its leading bytes, what must lie at or above the rest, and this
    // rank's logits that have these leading bytes.
    uint32_t prefix = 0;
    uint64_t target = 0;
    std::vector<Entry> entries;
  };

  std::string place(const SampleRow& row) const {
    return place_of(descriptor_.op, row.request, row.row);
  }

  void require_token(const SampleRow& row, double score) const {
    if (std::isfinite(score)) return;
    throw no_token(place(row), std::isnan(score) ? "NaN"
                               : score > 0       ? "infinite"
                                                 : "-inf throughout");
  }

  // At temperature 0 the target is one-hot, and the draft's distribution changes nothing.
  static bool uses_draft(const SampleRow& row) { return row.drafted && !row.greedy(); }

  std::vector<size_t> rows_where(bool (*wanted)(const SampleRow&)) const {
    std::vector<size_t> found;
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (wanted(rows_[i])) found.push_back(i);
    }
    return found;
  }

  const std::byte* logits(size_t row) const {
    return data_ + static_cast<int64_t>(row) * columns_ * static_cast<int64_t>(size_of(dtype_));
  }

  float logit(size_t row, int64_t column) const {
    float x[kSampleBlock];
    kernels().widen_sample_block(
        dtype_, logits(row) + column * static_cast<int64_t>(size_of(dtype_)), 1, x);
    return x[0];
  }

  float largest_logit(size_t row, int64_t* column) const {
    float score = -kInfinity;
    *column = -1;
    if (columns_) kernels().argmax(dtype_, logits(row), columns_, &score, column);
    return score;
  }

  // f(index in `which`, row) for every row of `which`, on several threads.
  template <class F>
  static void for_rows(const std::vector<size_t>& which, F f) {
    at::parallel_for(0, static_cast<int64_t>(which.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i, which[i]);
    });
  }

  // f(first column, values, weights) for every block of a row; without weights they are null.
  template <class F>
  void for_blocks(size_t row, bool weights, F f) const {
    float x[kSampleBlock], w[kSampleBlock];
    const State& state = states_[row];
    const float scale = weights ? rows_[row].scale() : 0;
    for (int64_t begin = 0; begin < columns_; begin += kSampleBlock) {
      kernels().widen_sample_block(dtype_,
                                   logits(row) + begin * static_cast<int64_t>(size_of(dtype_)),
                                   std::min(kSampleBlock, columns_ - begin), x);
      if (weights) kernels().block_weights(x, state.largest, scale, state.bound, w);
      f(begin, x, weights ? w : nullptr);
    }
  }

  void find_maxima() {
    const auto which =
        rows_where([](const SampleRow& row) { return row.truncated() || uses_draft(row); });
    if (which.empty()) return;
    std::vector<Maximum> maxima(which.size());
    for_rows(which, [&](int64_t i, size_t row) {
      int64_t column;
      maxima[i].largest = largest_logit(row, &column);
      const int64_t mine = rows_[row].draft - vocab_begin_;
      if (uses_draft(rows_[row]) && mine >= 0 && mine < columns_) {
        maxima[i].draft_logit = logit(row, mine);
        maxima[i].draft_probability = rows_[row].draft_probabilities[mine];
      }
    });
    exchange_rows(communicator_, descriptor_, maxima, [](Maximum& mine, const Maximum& theirs) {
      keep_larger(mine.largest, theirs.largest);
      keep_larger(mine.draft_logit, theirs.draft_logit);
      keep_larger(mine.draft_probability, theirs.draft_probability);
    });
    for (size_t i = 0; i < which.size(); ++i) {
      State& state = states_[which[i]];
      state.largest = maxima[i].largest;
      state.draft_logit = maxima[i].draft_logit;
      state.draft_probability = maxima[i].draft_probability;
      require_token(rows_[which[i]], state.largest);
    }
  }

  // Raises the bound to the largest logit at or above which lie top_k tokens, or top_p of the mass:
  // digit by digit of the bound, from histograms that are added over the ranks.
  void truncate(bool by_mass) {
    const auto which =
        by_mass ? rows_where([](const SampleRow& row) { return row.truncated() && row.top_p < 1; })
                : rows_where([](const SampleRow& row) { return row.truncated() && row.top_k > 0; });
    if (which.empty()) return;
    const int digits = digits_of(dtype_);
    for (int digit = 0; digit < digits; ++digit) {
      const int shift = 24 - 8 * digit;
      std::vector<uint64_t> histograms(which.size() * kBins);
      for_rows(which, [&](int64_t i, size_t row) {
        count(row, by_mass, digit, shift, histograms.data() + i * kBins);
      });
      exchange_rows(communicator_, descriptor_, histograms,
                    [](uint64_t& mine, uint64_t theirs) { mine += theirs; });
      for (size_t i = 0; i < which.size(); ++i) {
        const uint64_t* histogram = histograms.data() + i * kBins;
        State& state = states_[which[i]];
        if (digit == 0) {
          uint64_t total = 0;
          for (int bin = 0; bin < kBins; ++bin) total += histogram[bin];
          const SampleRow& row = rows_[which[i]];
          state.target = by_mass ? wanted_mass(row.top_p, total) : wanted_tokens(row.top_k, total);
          state.prefix = 0;
        }
        int bin = kBins - 1;
        for (; bin > 0 && histogram[bin] < state.target; --bin) state.target -= histogram[bin];
        state.prefix = state.prefix << 8 | static_cast<uint32_t>(bin);
      }
    }
    for (const size_t row : which) {
      State& state = states_[row];
      const int missing = 32 - 8 * digits;
      uint32_t key = state.prefix << missing;
      // The bits that narrow dtypes lack are 0 in a number and 1 in a negative number's key.
      if (!(key >> 31)) key |= (1u << missing) - 1;
      state.bound = value_of(key);
      state.entries = {};
    }
  }

  // Adds this rank's logits to a histogram of the digit, those that share the digits before it.
  void count(size_t row, bool by_mass, int digit, int shift, uint64_t* histogram) {
    State& state = states_[row];
    if (digit < 2) {
      for_blocks(row, by_mass, [&](int64_t, const float* x, const float* w) {
        for (int64_t i = 0; i < kSampleBlock; ++i) {
          if (!(x[i] >= state.bound)) continue;
          const Entry entry{key_of(x[i]), by_mass ? fixed(w[i]) : 1};
          if (digit == 1) {
            if (entry.key >> 24 != state.prefix) continue;
            state.entries.push_back(entry);
          }
          histogram[entry.key >> shift & (kBins - 1)] += entry.mass;
        }
      });
      return;
    }
    std::erase_if(state.entries,
                  [&](const Entry& entry) { return entry.key >> (shift + 8) != state.prefix; });
    for (const Entry& entry : state.entries) {
      histogram[entry.key >> shift & (kBins - 1)] += entry.mass;
    }
  }

  // The normaliser of what may be drawn, and with it the fate of the drafts.
  void find_masses() {
    const auto which = rows_where(uses_draft);
    if (which.empty()) return;
    std::vector<uint64_t> masses(which.size());
    for_rows(which, [&](int64_t i, size_t row) {
      for_blocks(row, true, [&](int64_t, const float*, const float* w) {
        for (int64_t j = 0; j < kSampleBlock; ++j) masses[i] += fixed(w[j]);
      });
    });
    exchange_rows(communicator_, descriptor_, masses,
                  [](uint64_t& mine, uint64_t theirs) { mine += theirs; });
    for (size_t i = 0; i < which.size(); ++i) {
      const SampleRow& row = rows_[which[i]];
      State& state = states_[which[i]];
      state.mass = masses[i];
      state.accepted = accepts(state.draft_logit, state.draft_probability, state.largest,
                               state.bound, row.scale(), state.mass, row.seed, row.position);
    }
  }

  std::vector<Winner> choose() {
    std::vector<Winner> winners(rows_.size());
    for_rows(rows_where([](const SampleRow&) { return true; }), [&](int64_t, size_t row) {
      if (states_[row].accepted) return;
      winners[row] = rows_[row].greedy()      ? most_probable(row)
                     : uses_draft(rows_[row]) ? from_residual(row)
                                              : from_target(row);
    });
    exchange(winners);
    return winners;
  }

  void exchange(std::vector<Winner>& winners) {
    exchange_rows(communicator_, descriptor_, winners, [](Winner& mine, const Winner& theirs) {
      if (replaces(theirs.key, theirs.id, mine.key, mine.id)) mine = theirs;
    });
  }

  // Where the target has nothing above the draft's distribution the two are the same, and a draft
  // was refused by rounding, or because it is no token: a draw from the target takes its place.
  void replace_without_residual(std::vector<Winner>& winners) {
    std::vector<size_t> which;
    for (size_t i = 0; i < rows_.size(); ++i) {
      const bool refused = uses_draft(rows_[i]) && !states_[i].accepted;
      if (refused && winners[i].key == -kInfinity) which.push_back(i);
    }
    if (which.empty()) return;
    std::vector<Winner> drawn(which.size());
    for_rows(which, [&](int64_t i, size_t row) { drawn[i] = from_target(row); });
    exchange(drawn);
    for (size_t i = 0; i < which.size(); ++i) winners[which[i]] = drawn[i];
  }

  Winner most_probable(size_t row) const {
    int64_t column;
    const float score = largest_logit(row, &column);
    if (column < 0) return {score, Winner{}.id, score};
    return {score, static_cast<int32_t>(vocab_begin_ + column), score};
  }

  Noise noise_of(const SampleRow& row, int64_t block) const {
    const int64_t global = vocab_begin_ / kSampleBlock + block;
    return noise(row.seed, row.position, stream_, static_cast<uint32_t>(global));
  }

  // The token of a block at which the weights have added up to a fraction of their sum.
  Winner inside(size_t row, int64_t block, double key, double fraction,
                const float* weights) const {
    double total = 0, sum = 0;
    for (int64_t i = 0; i < kSampleBlock; ++i) total += weights[i];
    int64_t chosen = 0;
    for (int64_t i = 0; i < kSampleBlock; ++i) {
      if (weights[i] == 0) continue;
      chosen = i;
      sum += weights[i];
      if (sum > fraction * total) break;
    }
    const int64_t column = block * kSampleBlock + chosen;
    return {key, static_cast<int32_t>(vocab_begin_ + column), logit(row, column)};
  }

  Winner from_target(size_t row) const {
    const SampleRow& request = rows_[row];
    const int64_t blocks = (columns_ + kSampleBlock - 1) / kSampleBlock;
    std::vector<float> maxima(blocks), sums(blocks);
    const float scale = request.scale(), bound = states_[row].bound;
    kernels().block_sums(dtype_, logits(row), columns_, scale, bound, maxima.data(), sums.data());
    double best = -std::numeric_limits<double>::infinity();
    int64_t winner = -1;
    for (int64_t block = 0; block < blocks; ++block) {
      if (std::isnan(maxima[block]) || maxima[block] == kInfinity) {
        return {maxima[block], Winner{}.id, maxima[block]};
      }
      if (sums[block] == 0) continue;
      const double key = double{maxima[block]} * double{scale} +
                         std::log(sums[block] / noise_of(request, block).exponential());
      if (key > best) {
        best = key;
        winner = block;
      }
    }
    if (winner < 0) return {};
    float x[kSampleBlock], w[kSampleBlock];
    const int64_t begin = winner * kSampleBlock;
    kernels().widen_sample_block(dtype_,
                                 logits(row) + begin * static_cast<int64_t>(size_of(dtype_)),
                                 std::min(kSampleBlock, columns_ - begin), x);
    kernels().block_weights(x, maxima[winner], scale, bound, w);
    return inside(row, winner, best, noise_of(request, winner).second, w);
  }

  // A draw from max(target - draft, 0).
  Winner from_residual(size_t row) const {
    const SampleRow& request = rows_[row];
    const float per_weight = static_cast<float>(kOne / static_cast<double>(states_[row].mass));
    double best = -std::numeric_limits<double>::infinity();
    int64_t winner = -1;
    bool nan = false;
    float kept[kSampleBlock], residual[kSampleBlock];
    for_blocks(row, true, [&](int64_t begin, const float*, const float* w) {
      double sum = 0;
      for (int64_t i = 0; i < kSampleBlock; ++i) {
        const float q = begin + i < columns_ ? request.draft_probabilities[begin + i] : 0;
        nan |= std::isnan(q);
        residual[i] = std::max(w[i] * per_weight - q, 0.0f);
        sum += residual[i];
      }
      if (sum == 0) return;
      const int64_t block = begin / kSampleBlock;
      const double key = std::log(sum / noise_of(request, block).exponential());
      if (key > best) {
        best = key;
        winner = block;
        std::copy(residual, residual + kSampleBlock, kept);
      }
    });
    if (nan) return {std::numeric_limits<double>::quiet_NaN(), Winner{}.id, 0};
    if (winner < 0) return {};
    return inside(row, winner, best, noise_of(request, winner).second, kept);
  }

  std::vector<Normaliser> normalise() {
    if (!log_probabilities_) return {};
    std::vector<Normaliser> normalisers(rows_.size());
    for_rows(rows_where([](const SampleRow&) { return true; }), [&](int64_t, size_t row) {
      const int64_t blocks = (columns_ + kSampleBlock - 1) / kSampleBlock;
      std::vector<float> maxima(blocks), sums(blocks);
      kernels().block_sums(dtype_, logits(row), columns_, 1, kNoBound, maxima.data(), sums.data());
      for (int64_t block = 0; block < blocks; ++block) {
        add_normaliser(normalisers[row], {maxima[block], 0, sums[block]});
      }
    });
    exchange_rows(communicator_, descriptor_, normalisers, add_normaliser);
    return normalisers;
  }

  Communicator& communicator_;
  Stream stream_;
  DType dtype_;
  const std::byte* data_;
  int64_t columns_;
  int64_t vocab_begin_;
  const std::vector<SampleRow>& rows_;
  std::vector<State> states_;
  bool log_probabilities_;
  Descriptor descriptor_;
};

void check_entries(const at::Tensor& x, at::ScalarType dtype, int64_t batch, const char* name) {
  TORCH_CHECK_VALUE(
      x.scalar_type() == dtype && x.dim() == 1 && x.size(0) == batch && x.is_contiguous(), name,
      " is not a contiguous ", dtype, " [", batch, "]");
}

std::tuple<at::Tensor, at::Tensor> vocab_parallel_sample(
    const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
    const at::Tensor& top_p, const at::Tensor& seed, const at::Tensor& position, bool draft,
    bool log_probabilities, int64_t vocab_begin, int64_t handle) {
  Communicator& communicator = Communicator::from_handle(handle);
  check_matrix(logits, "logits");
  const int64_t batch = logits.size(0);
  const SamplingTensors sampling{temperature, top_k, top_p, seed, position};
  check_sampling(sampling, batch);
  std::vector<SampleRow> rows;
  for (int64_t b = 0; b < batch; ++b) rows.push_back(sample_row(sampling, b, 0));
  at::Tensor tokens = empty_output({batch}, at::kLong);
  at::Tensor logs = empty_output({log_probabilities ? batch : 0}, at::kFloat);
  sample_rows(communicator, Op::vocab_parallel_sample, draft ? Stream::draft : Stream::target,
              logits, vocab_begin, rows, tokens.mutable_data_ptr<int64_t>(),
              log_probabilities ? logs.mutable_data_ptr<float>() : nullptr);
  return {tokens, logs};
}

}  // namespace

void check_sampling(const SamplingTensors& sampling, int64_t batch) {
  check_entries(sampling.temperature, at::kDouble, batch, "temperature");
  check_entries(sampling.top_k, at::kLong, batch, "top_k");
  check_entries(sampling.top_p, at::kDouble, batch, "top_p");
  check_entries(sampling.seed, at::kLong, batch, "seed");
  check_entries(sampling.position, at::kLong, batch, "position");
}

SampleRow sample_row(const SamplingTensors& sampling, int64_t request, int64_t row) {
  SampleRow made;
  made.request = request;
  made.row = row;
  made.temperature = sampling.temperature.const_data_ptr<double>()[request];
  made.top_k = sampling.top_k.const_data_ptr<int64_t>()[request];
  made.top_p = sampling.top_p.const_data_ptr<double>()[request];
  made.seed = static_cast<uint64_t>(sampling.seed.const_data_ptr<int64_t>()[request]);
  made.position = static_cast<uint64_t>(sampling.position.const_data_ptr<int64_t>()[request] + row);
  return made;
}

void sample_rows(Communicator& communicator, Op op, Stream stream, const at::Tensor& logits,
                 int64_t vocab_begin, const std::vector<SampleRow>& rows, int64_t* tokens,
                 float* log_probabilities) {
  const bool draws = !std::all_of(rows.begin(), rows.end(), [](auto& row) { return row.greedy(); });
  TORCH_CHECK_VALUE(!draws || logits.size(1) == 0 || vocab_begin % kSampleBlock == 0,
                    "vocab_begin is ", vocab_begin, ": shards must be cut at multiples of ",
                    kSampleBlock, ", so that draws do not depend on the number of ranks");
  Sampler(communicator, op, stream, logits, vocab_begin, rows, log_probabilities != nullptr)
      .run(tokens, log_probabilities);
}

TORCH_LIBRARY_IMPL(commfuse, CPU, m) { m.impl("vocab_parallel_sample", &vocab_parallel_sample); }

}  // namespace commfuse
