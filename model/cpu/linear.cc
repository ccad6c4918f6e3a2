// Matmuls with kernels that were packed once, at the start, on a CPU: what model/cpu/linear.py describes. A tile of
// sums stays in registers while it walks the inner axis, so a row's arithmetic does not depend on what else is in the
// call; what is done with the sums is done before they leave the first cache. Rows of zeros, as padding's are, give
// zeros and take no time.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace {

constexpr int kStrip = 16;                // columns of a kernel that lie beside each other
constexpr int kTile = kVectors * kLanes;  // columns that are summed up at once
constexpr int kPanel = 64;                // columns that a thread takes at once
constexpr int64_t kBlock = 96;            // rows that it takes with them
constexpr int64_t kHeadBlock = 384;       // the same of the head's rows
constexpr int64_t kAhead = 4;             // such blocks for each thread before their logits are looked through
constexpr int64_t kLook = 8;              // logits of one state that are looked at together
constexpr int64_t kDots = 65536;          // numbers that a thread sums up at once
constexpr int64_t kSteps = 192;           // of one sum: sums of such sums are more exact, and cost 1%

static_assert(kPanel % kTile == 0 && kStrip % kLanes == 0 && kBlock % kRows == 0);

// What adapters add to the sums of their rows: (x A) B, of which x A is made already.
struct Added {
  const void* inner = nullptr;  // [rows, steps]; null: there are no adapters
  const void* factors;          // B of each slot, as kernels are
  int64_t steps;
  const int32_t* slots;  // of each row; below 0: none
};

// One kernel [strips, steps, kStrip] and what comes of it.
struct Linear {
  const void* kernel;
  void* out;        // [rows, columns]
  int64_t columns;  // the last panel may have more: zeros
  const float* bias = nullptr;
  Added added = {};

  int64_t panels() const { return (columns + kPanel - 1) / kPanel; }
};

struct Input {
  const void* rows;  // [count, steps]
  int64_t count, steps;
};

// Adds a * b to sums, or puts it there if these are the `first`: `rows` rows by `vectors` vectors of columns, over
// `count` of the strips' `steps`. With `asks` it prefetches kRows units from `ahead` on at every step.
template <typename D, int rows, int vectors, bool asks>
void Multiply(const typename D::Unit* a, int64_t steps, const typename D::Unit* b, int64_t count, bool first,
              float* sums, const typename D::Unit* ahead) {
  Floats tile[rows][vectors] = {};
  for (int64_t step = 0; step < count; ++step, b += kStrip) {
    if constexpr (asks) __builtin_prefetch(ahead + step * kRows, 0, 2);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) {
        const int column = j * kLanes;
        tile[i][j] = D::Add(tile[i][j], a + i * steps + step, b + column / kStrip * steps * kStrip + column % kStrip);
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) {
      float* sum = sums + i * kPanel + j * kLanes;
      Store(sum, first ? tile[i][j] : Load(sum) + tile[i][j]);
    }
  }
}

template <typename D, int vectors, bool asks>
void Multiply(int64_t rows, const typename D::Unit* a, int64_t steps, const typename D::Unit* b, int64_t count,
              bool first, float* sums, const typename D::Unit* ahead) {
  static_assert(kRows == 6);
  switch (rows) {
    case 1: return Multiply<D, 1, vectors, asks>(a, steps, b, count, first, sums, ahead);
    case 2: return Multiply<D, 2, vectors, asks>(a, steps, b, count, first, sums, ahead);
    case 3: return Multiply<D, 3, vectors, asks>(a, steps, b, count, first, sums, ahead);
    case 4: return Multiply<D, 4, vectors, asks>(a, steps, b, count, first, sums, ahead);
    case 5: return Multiply<D, 5, vectors, asks>(a, steps, b, count, first, sums, ahead);
    default: return Multiply<D, 6, vectors, asks>(a, steps, b, count, first, sums, ahead);
  }
}

// sums [rows, kPanel] = a * b, of one panel's first `columns` and possibly some more. What kSteps of a tile's columns
// take of b stays in the first cache for all rows (Goto and van de Geijn, "Anatomy of high-performance matrix
// multiplication", 2008), and each tile of rows prefetches its share of what is taken next.
template <typename D, bool asks = false>
void Multiply(int64_t rows, const typename D::Unit* a, int64_t steps, const typename D::Unit* b, float* sums,
              int64_t columns, const typename D::Unit* ahead = nullptr) {
  for (int64_t first = 0; first < steps; first += kSteps) {
    const int64_t count = std::min(kSteps, steps - first);
    for (int64_t column = 0; column < columns; column += kTile) {
      const auto* here = b + column / kStrip * steps * kStrip + column % kStrip + first * kStrip;
      const auto* next = column + kTile < columns ? here + kTile * steps : b + (first + count) * kStrip;
      const int64_t share = (count * kRows + rows - 1) / rows;
      const auto multiply = column + kLanes < columns ? Multiply<D, kVectors, asks> : Multiply<D, 1, asks>;
      for (int64_t row = 0; row < rows; row += kRows) {
        for (int64_t i = 0; rows > kRows && i < share; ++i) {
          __builtin_prefetch(next + (row / kRows * share + i) * kStrip, 0, 2);
        }
        multiply(std::min<int64_t>(kRows, rows - row), a + row * steps + first, steps, here, count, first == 0,
                 sums + row * kPanel + column, asks ? ahead + row * steps + first * kRows : nullptr);
      }
    }
  }
}

// Whether all of these are 0, of either sign. Of rows that are not, a look at the first few mostly tells.
template <typename D>
bool Zeros(const typename D::Unit* units, int64_t count) {
  constexpr uint32_t kMagnitude = D::kPacked == 2 ? 0x7fff7fff : 0x7fffffff;
  for (int64_t first = 0; first < count; first += 16) {
    uint32_t any = 0;
    for (int64_t i = first; i < std::min(first + 16, count); ++i) any |= std::bit_cast<uint32_t>(units[i]);
    if (any & kMagnitude) return false;
  }
  return true;
}

// A piece of a product: rows row:row+rows and one panel.
struct Block {
  int64_t panel, row, rows;
};

// Calls with every block, on all threads. Rows go through all panels while they stay in the second cache.
template <typename Work>
void EachBlock(ffi::ThreadPool& pool, int64_t panels, int64_t rows, Work work) {
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t fair = rows * panels / (8 * threads) / kRows * kRows;
  const int64_t most = std::clamp<int64_t>(fair, 2 * kRows, kBlock), blocks = (rows + most - 1) / most;
  Share(pool, blocks * panels, [=] {
    return [=](int64_t unit) {
      const int64_t first = unit / panels * most;
      work(Block{unit % panels, first, std::min(most, rows - first)});
    };
  });
}

// Calls with each run of neighbouring rows that have one adapter: its first row, its length and the slot.
template <typename Work>
void EachRun(const int32_t* slots, int64_t rows, Work work) {
  for (int64_t first = 0, last = 1; first < rows; first = last++) {
    while (last < rows && slots[last] == slots[first]) ++last;
    if (slots[first] >= 0) work(first, last - first, slots[first]);
  }
}

// Adds to a block's sums what the rows' adapters have for them.
template <typename D>
void Add(const Linear& linear, const Block& block, int64_t columns, float (*sums)[kPanel]) {
  using Unit = typename D::Unit;
  const Added& added = linear.added;
  if (!added.inner) return;
  EachRun(added.slots + block.row, block.rows, [&](int64_t first, int64_t count, int64_t slot) {
    alignas(64) float own[kBlock][kPanel];
    const Unit* inner = static_cast<const Unit*>(added.inner) + (block.row + first) * added.steps;
    const Unit* factors =
        static_cast<const Unit*>(added.factors) + (slot * linear.panels() + block.panel) * added.steps * kPanel;
    Multiply<D>(count, inner, added.steps, factors, own[0], columns);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t column = 0; column < columns; column += kLanes) {
        float* sum = &sums[first + i][column];
        Store(sum, Load(sum) + Load(&own[i][column]));
      }
    }
  });
}

// Adds a panel's biases to a block's sums.
void AddBias(const Linear& linear, const Block& block, int64_t columns, float (*sums)[kPanel]) {
  if (!linear.bias) return;
  alignas(64) float bias[kPanel] = {};
  std::memcpy(bias, linear.bias + block.panel * kPanel, columns * sizeof(float));
  for (int64_t i = 0; i < block.rows; ++i) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Store(&sums[i][column], Load(&sums[i][column]) + Load(&bias[column]));
    }
  }
}

// sums = x * the linear's panel, for a block's rows, with what adapters add and the bias.
template <typename D>
void Multiply(const Input& x, const Linear& linear, const Block& block, int64_t columns, float (*sums)[kPanel]) {
  using Unit = typename D::Unit;
  const Unit* rows = static_cast<const Unit*>(x.rows) + block.row * x.steps;
  const Unit* kernel = static_cast<const Unit*>(linear.kernel) + block.panel * x.steps * kPanel;
  const auto zeros = [&](int64_t row) {
    return Zeros<D>(rows + row * x.steps, std::min<int64_t>(kRows, block.rows - row) * x.steps);
  };
  for (int64_t first = 0, last; first < block.rows; first = last) {
    const bool none = zeros(first);
    for (last = first + kRows; last < block.rows && zeros(last) == none; last += kRows) {
    }
    last = std::min(last, block.rows);
    if (none) {
      std::fill_n(sums[first], (last - first) * kPanel, 0.0f);
    } else {
      Multiply<D>(last - first, rows + first * x.steps, x.steps, kernel, sums[first], columns);
    }
  }
  Add<D>(linear, block, columns, sums);
  AddBias(linear, block, columns, sums);
}

// The factors A of one linear, [slots, strips, steps, kStrip], and x A of each row's slot.
struct Reduced {
  const void* factors;
  void* out;  // [rows, parts * kStrip]
  int64_t parts;
};

template <typename D>
void Reduce(ffi::ThreadPool& pool, const Input& x, const int32_t* slots, const std::vector<Reduced>& all) {
  using Unit = typename D::Unit;
  int64_t parts = 0;
  for (const Reduced& each : all) parts += each.parts;
  EachBlock(pool, parts, x.count, [=](const Block& block) {
    int64_t part = block.panel;
    size_t number = 0;
    for (; part >= all[number].parts; ++number) part -= all[number].parts;
    const Reduced& one = all[number];
    const int64_t width = one.parts * kStrip;
    auto* out = static_cast<typename D::Stored*>(one.out) + block.row * width + part * kStrip;
    for (int64_t i = 0; i < block.rows; ++i) std::memset(out + i * width, 0, kStrip * sizeof(*out));
    EachRun(slots + block.row, block.rows, [&](int64_t first, int64_t count, int64_t slot) {
      alignas(64) float sums[kBlock][kPanel];
      alignas(64) Unit narrowed[kStrip / D::kPacked];
      const Unit* from = static_cast<const Unit*>(x.rows) + (block.row + first) * x.steps;
      const Unit* factors = static_cast<const Unit*>(one.factors) + (slot * one.parts + part) * x.steps * kStrip;
      Multiply<D>(count, from, x.steps, factors, sums[0], kStrip);
      for (int64_t i = 0; i < count; ++i) {
        for (int column = 0; column < kStrip; column += kLanes) {
          D::Round(&narrowed[column / D::kPacked], Load(&sums[i][column]));
        }
        std::memcpy(out + (first + i) * width, narrowed, kStrip * sizeof(*out));
      }
    });
  });
}

template <typename D>
void Products(ffi::ThreadPool& pool, const Input& x, const std::vector<Linear>& linears) {
  int64_t panels = 0;
  for (const Linear& linear : linears) panels += linear.panels();
  EachBlock(pool, panels, x.count, [x, linears](Block block) {
    size_t number = 0;
    for (; block.panel >= linears[number].panels(); ++number) block.panel -= linears[number].panels();
    const Linear& linear = linears[number];
    alignas(64) float sums[kBlock][kPanel];
    const int64_t count = std::min<int64_t>(kPanel, linear.columns - block.panel * kPanel);
    float* out = static_cast<float*>(linear.out) + block.row * linear.columns + block.panel * kPanel;
    Multiply<D>(x, linear, block, count, sums);
    for (int64_t i = 0; i < block.rows; ++i) std::memcpy(out + i * linear.columns, sums[i], count * sizeof(float));
  });
}

// x / (1 + exp(-x))
Floats Silu(Floats x) {
  const Floats e = Exponential(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : All(1.0f)) / (1.0f + e);
}

// By its usual approximation with a hyperbolic tangent.
Floats Gelu(Floats x) {
  return 0.5f * x * (1.0f + HyperbolicTangent(0.7978845608f * (x + 0.044715f * x * x * x)));
}

// x times half of 1 + erf(x / sqrt(2)), to 3e-7 of itself above -1, and of x below. The error function's is that of
// Abramowitz and Stegun, 7.1.26.
Floats GeluByErf(Floats x) {
  const Floats z = 0.7071067812f * (x < 0.0f ? -x : x), t = 1.0f / (1.0f + 0.3275911f * z);
  Floats p = All(1.061405429f);
  p = Fused(p, t, All(-1.453152027f));
  p = Fused(p, t, All(1.421413741f));
  p = Fused(p, t, All(-0.284496736f));
  p = Fused(p, t, All(0.254829592f));
  const Floats beyond = p * t * Exponential(-z * z);
  return 0.5f * x * (x < 0.0f ? beyond : 2.0f - beyond);
}

// activation(x * kernel + bias), narrowed.
template <typename D, Floats (*activation)(Floats)>
void Activated(ffi::ThreadPool& pool, const Input& x, const Linear& linear) {
  using Unit = typename D::Unit;
  EachBlock(pool, linear.panels(), x.count, [x, linear](const Block& block) {
    alignas(64) float sums[kBlock][kPanel];
    alignas(64) Unit narrowed[kPanel / D::kPacked];
    const int64_t count = std::min<int64_t>(kPanel, linear.columns - block.panel * kPanel);
    auto* out = static_cast<typename D::Stored*>(linear.out) + block.row * linear.columns + block.panel * kPanel;
    Multiply<D>(x, linear, block, count, sums);
    for (int64_t i = 0; i < block.rows; ++i) {
      for (int64_t column = 0; column < count; column += kLanes) {
        D::Round(&narrowed[column / D::kPacked], activation(Load(&sums[i][column])));
      }
      std::memcpy(out + i * linear.columns, narrowed, count * sizeof(*out));
    }
  });
}

// activation(x * gate) * (x * up), narrowed.
template <typename D, Floats (*activation)(Floats)>
void Gated(ffi::ThreadPool& pool, const Input& x, const Linear& gate, const Linear& up) {
  using Unit = typename D::Unit;
  EachBlock(pool, up.panels(), x.count, [x, gate, up](const Block& block) {
    alignas(64) float gates[kBlock][kPanel], ups[kBlock][kPanel];
    alignas(64) Unit narrowed[kPanel / D::kPacked];
    const int64_t count = std::min<int64_t>(kPanel, up.columns - block.panel * kPanel);
    auto* out = static_cast<typename D::Stored*>(up.out) + block.row * up.columns + block.panel * kPanel;
    Multiply<D>(x, gate, block, count, gates);
    Multiply<D>(x, up, block, count, ups);
    for (int64_t i = 0; i < block.rows; ++i) {
      for (int64_t column = 0; column < count; column += kLanes) {
        D::Round(&narrowed[column / D::kPacked], activation(Load(&gates[i][column])) * Load(&ups[i][column]));
      }
      std::memcpy(out + i * up.columns, narrowed, count * sizeof(*out));
    }
  });
}

// Rows as they are multiplied, `steps` units each. Where a dtype is multiplied as another they are made in `room`.
template <typename D>
const typename D::Unit* Units(const typename D::Stored* rows, int64_t count, std::vector<typename D::Unit>& room) {
  if constexpr (sizeof(typename D::Unit) == D::kPacked * sizeof(typename D::Stored)) {
    return reinterpret_cast<const typename D::Unit*>(rows);
  } else {
    room.resize(count);
    for (int64_t i = 0; i < count; ++i) room[i] = D::Pack(rows + i * D::kPacked);
    return room.data();
  }
}

// Rows packed as a kernel's columns.
template <typename D>
std::vector<typename D::Unit> Packed(const Input& x) {
  const int64_t panels = (x.count + kPanel - 1) / kPanel;
  std::vector<typename D::Unit> packed(panels * x.steps * kPanel);
  for (int64_t row = 0; row < x.count; ++row) {
    const auto* from = static_cast<const typename D::Stored*>(x.rows) + row * x.steps * D::kPacked;
    auto* to = packed.data() + row / kStrip * x.steps * kStrip + row % kStrip;
    for (int64_t step = 0; step < x.steps; ++step) to[step * kStrip] = D::Pack(from + step * D::kPacked);
  }
  return packed;
}

// Of a panel's columns the highest logit so far, the first row that has it, and the sum of exponentials of the
// distances from it.
struct Sums {
  float highest[kPanel], total[kPanel];
  int32_t best[kPanel];

  void Fold(float (*logits)[kPanel], int64_t first, int64_t rows, int64_t columns, float softcap, float scale) {
    for (int64_t at = 0; at < columns; at += kLanes) {
      const Floats before = Load(&highest[at]);
      Floats now = before;
      Ints row = *reinterpret_cast<const Ints*>(&best[at]);
      for (int64_t i = 0; i < rows; ++i) {
        Floats logit = Load(&logits[i][at]);
        if (softcap > 0) Store(&logits[i][at], logit = softcap * HyperbolicTangent(logit / softcap));
        if (scale != 1) Store(&logits[i][at], logit = logit * scale);
        row = logit > now ? static_cast<int32_t>(first + i) - Ints{} : row;
        now = logit > now ? logit : now;
      }
      Floats sum = Load(&total[at]) * Exponential(before - now);
      for (int64_t i = 0; i < rows; ++i) sum += Exponential(Load(&logits[i][at]) - now);
      Store(&highest[at], now);
      Store(&total[at], sum);
      *reinterpret_cast<Ints*>(&best[at]) = row;
    }
  }
};

// Of each row of x: log(sum(exp(logits))), the number of the first of the highest logits, and that logit.
struct Found {
  float* normalizers;
  int32_t* best;
  float* highest;
};

// The highest logits of one state so far, of equal ones those of lower rows, which come first.
class Highest {
 public:
  struct Entry {
    float logit;
    int32_t row;
    bool operator<(const Entry& other) const {
      return logit > other.logit || (logit == other.logit && row < other.row);
    }
  };

  explicit Highest(int64_t count) : count_(count) { entries_.reserve(2 * count); }

  // What a logit of a higher row must exceed to be among them.
  float threshold() const { return threshold_; }

  void Add(float logit, int64_t row) {
    entries_.push_back({logit, static_cast<int32_t>(row)});
    if (static_cast<int64_t>(entries_.size()) < 2 * count_) return;
    std::nth_element(entries_.begin(), entries_.begin() + count_ - 1, entries_.end());
    entries_.resize(count_);
    threshold_ = entries_.back().logit;
  }

  // Writes them in order; where there are fewer, logits that are not finite have left no others.
  void Write(float* logits, int32_t* rows) {
    std::sort(entries_.begin(), entries_.end());
    entries_.resize(count_, {std::numeric_limits<float>::quiet_NaN(), 0});
    for (int64_t i = 0; i < count_; ++i) {
      logits[i] = entries_[i].logit;
      rows[i] = entries_[i].row;
    }
  }

 private:
  int64_t count_;
  float threshold_ = -std::numeric_limits<float>::infinity();
  std::vector<Entry> entries_;
};

bool Any(Ints mask) {
  const auto words = std::bit_cast<std::array<int64_t, kLanes / 2>>(mask);
  return std::reduce(words.begin(), words.end(), int64_t{0}, std::bit_or<int64_t>()) != 0;
}

// Looks through logits [rows, stride] of `states` neighbouring states, of the head's rows from `first` on.
void Look(const float* logits, int64_t stride, int64_t first, int64_t rows, Highest* found, int64_t states) {
  alignas(64) float thresholds[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    thresholds[lane] = lane < states ? found[lane].threshold() : std::numeric_limits<float>::infinity();
  }
  for (int64_t row = 0; row < rows; row += kLook) {
    const int64_t last = std::min(row + kLook, rows);
    Floats most = Load(logits + row * stride);
    for (int64_t i = row + 1; i < last; ++i) {
      const Floats logit = Load(logits + i * stride);
      most = logit > most ? logit : most;
    }
    // A NaN hides what follows it; its state has no scores anyway.
    if (!Any(most > Load(thresholds))) continue;
    for (int64_t lane = 0; lane < states; ++lane) {
      if (!(most[lane] > thresholds[lane])) continue;
      for (int64_t i = row; i < last; ++i) {
        if (logits[i * stride + lane] > thresholds[lane]) {
          found[lane].Add(logits[i * stride + lane], first + i);
          thresholds[lane] = found[lane].threshold();
        }
      }
    }
  }
}

// What is found of each state besides its normaliser.
struct Top {
  int64_t count, stride;
  float* logits;  // [states, stride], of which `count` are written
  int32_t* rows;
};

// The logits are x times the head's [vocabulary, steps] rows, capped, then scaled. These are the rows of the products
// here, and x's become a panel's columns, so that the head is read as it lies. Where the highest are asked for, the
// logits of some blocks of the head are kept, and looked through before those of the next take their place.
template <typename D>
void Normalizers(ffi::ThreadPool& pool, const Input& x, const Input& head, float softcap, float scale, const Found& out,
                 const Top& top) {
  using Unit = typename D::Unit;
  using Stored = typename D::Stored;
  const int64_t panels = (x.count + kPanel - 1) / kPanel, blocks = (head.count + kHeadBlock - 1) / kHeadBlock;
  const auto packed = std::make_shared<const std::vector<Unit>>(Packed<D>(x));
  Sums none{};
  std::fill_n(none.highest, kPanel, -std::numeric_limits<float>::infinity());
  const auto parts = std::make_shared<std::vector<Sums>>(blocks * panels, none);
  const auto found = std::make_shared<std::vector<Highest>>(top.count ? x.count : 0, Highest(top.count));
  const int64_t together = top.count ? kAhead * std::max<int64_t>(pool.num_threads(), 1) : blocks;
  const int64_t stride = panels * kPanel;
  const auto kept = std::make_shared<std::vector<float>>(top.count ? together * kHeadBlock * stride : 0);
  for (int64_t begin = 0; begin < blocks; begin += together) {
    const int64_t count = std::min(together, blocks - begin), first = begin * kHeadBlock;
    Share(pool, count, [=] {
      return [=, room = std::vector<Unit>()](int64_t unit) mutable {
        const int64_t block = begin + unit;
        const int64_t last = std::min(head.count, (block + 1) * kHeadBlock), width = x.steps * D::kPacked;
        for (int64_t panel = 0; panel < panels; ++panel) {
          const Unit* states = packed->data() + panel * x.steps * kPanel;
          const int64_t columns = std::min<int64_t>(kPanel, x.count - panel * kPanel);
          for (int64_t row = block * kHeadBlock; row < last; row += kRows) {
            alignas(64) float logits[kRows][kPanel];
            const int64_t rows = std::min<int64_t>(kRows, last - row);
            const Stored* stored = static_cast<const Stored*>(head.rows) + row * width;
            // The head comes from memory, and each core waits for it: what comes after the next rows is prefetched.
            const auto* ahead = reinterpret_cast<const Unit*>(stored + 2 * kRows * width);
            Multiply<D, true>(rows, Units<D>(stored, rows * x.steps, room), x.steps, states, logits[0], columns, ahead);
            (*parts)[block * panels + panel].Fold(logits, row, rows, columns, softcap, scale);
            for (int64_t i = 0; top.count && i < rows; ++i) {
              std::memcpy(kept->data() + (row - first + i) * stride + panel * kPanel, logits[i], sizeof(logits[i]));
            }
          }
        }
      };
    });
    if (!top.count) continue;
    Share(pool, (x.count + kLanes - 1) / kLanes, [=] {
      return [=](int64_t unit) {
        const int64_t state = unit * kLanes, rows = std::min(head.count - first, count * kHeadBlock);
        const int64_t states = std::min<int64_t>(kLanes, x.count - state);
        Look(kept->data() + state, stride, first, rows, found->data() + state, states);
      };
    });
  }
  for (int64_t row = 0; row < x.count; ++row) {
    const int64_t panel = row / kPanel, column = row % kPanel;
    float highest = none.highest[0], total = 0;
    int32_t best = 0;
    const auto part = [&](int64_t block) -> const Sums& { return (*parts)[block * panels + panel]; };
    for (int64_t block = 0; block < blocks; ++block) {
      if (part(block).highest[column] > highest) {
        highest = part(block).highest[column];
        best = part(block).best[column];
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      total += part(block).total[column] * std::exp(part(block).highest[column] - highest);
    }
    out.normalizers[row] = highest + std::log(total);
    if (top.count) {
      (*found)[row].Write(top.logits + row * top.stride, top.rows + row * top.stride);
      continue;
    }
    out.best[row] = best;
    out.highest[row] = std::isnan(total) ? total : highest;
  }
}

// The sum of a * b, in one order for each count.
float Dot(const float* a, const float* b, int64_t count) {
  Floats sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * kLanes <= count; at += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sums[j] = Fused(Load(a + at + j * kLanes), Load(b + at + j * kLanes), sums[j]);
  }
  for (; at + kLanes <= count; at += kLanes) sums[0] = Fused(Load(a + at), Load(b + at), sums[0]);
  float total = Across((sums[0] + sums[1]) + (sums[2] + sums[3]), Plus)[0];
  for (; at < count; ++at) total += a[at] * b[at];
  return total;
}

// The sum of each row of a * b.
void Dots(ffi::ThreadPool& pool, const float* a, const float* b, int64_t rows, int64_t width, float* out) {
  const int64_t most = std::max<int64_t>(1, kDots / width);
  Share(pool, (rows + most - 1) / most, [=] {
    return [=](int64_t unit) {
      for (int64_t row = unit * most; row < std::min(rows, (unit + 1) * most); ++row) {
        out[row] = Dot(a + row * width, b + row * width, width);
      }
    };
  });
}

// The sum of a, in one order for each count.
float Sum(const float* a, int64_t count) {
  Floats sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * kLanes <= count; at += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sums[j] += Load(a + at + j * kLanes);
  }
  for (; at + kLanes <= count; at += kLanes) sums[0] += Load(a + at);
  float total = Across((sums[0] + sums[1]) + (sums[2] + sums[3]), Plus)[0];
  for (; at < count; ++at) total += a[at];
  return total;
}

// Each row of x, or of x + more, less its mean, over its standard deviation, times scale, plus bias.
void LayerNorms(ffi::ThreadPool& pool, const float* x, const float* more, const float* scale, const float* bias,
                int64_t rows, int64_t width, float eps, float* out) {
  const int64_t most = std::max<int64_t>(1, kDots / 4 / width);
  Share(pool, (rows + most - 1) / most, [=] {
    return [=](int64_t unit) {
      for (int64_t row = unit * most; row < std::min(rows, (unit + 1) * most); ++row) {
        const float* from = x + row * width;
        float* to = out + row * width;
        if (more) {
          for (int64_t at = 0; at < width; ++at) to[at] = from[at] + more[row * width + at];
          from = to;
        }
        const float mean = Sum(from, width) / width;
        for (int64_t at = 0; at < width; ++at) to[at] = from[at] - mean;
        const float factor = 1.0f / std::sqrt(Dot(to, to, width) / width + eps);
        for (int64_t at = 0; at < width; ++at) to[at] = to[at] * factor * scale[at] + bias[at];
      }
    };
  });
}

template <typename D>
Input Of(ffi::AnyBuffer x) {
  return {x.untyped_data(), x.dimensions()[0], x.dimensions()[1] / D::kPacked};
}

// What comes of `work` for the operands' dtype. Without bfloat16 instructions model/cpu/linear.py packs no bfloat16.
template <typename Work>
ffi::Error ByDtype(ffi::AnyBuffer x, Work work) {
  if (x.element_type() == ffi::F32) return work(Float32());
#if defined(__AVX512BF16__)
  if (x.element_type() == ffi::BF16) return work(BFloat16());
#endif
  return ffi::Error::InvalidArgument("packed kernels of this dtype are not multiplied on this processor");
}

// Kernels with as many results' columns, followed by the bias of each, which may be empty, and, where there are
// adapters, by x A of each and by B of each.
ffi::ErrorOr<std::vector<Linear>> Linears(ffi::RemainingArgs args, ffi::Buffer<ffi::S32> slots,
                                          const std::vector<ffi::AnyBuffer>& outs) {
  const size_t count = outs.size();
  const bool adapted = args.size() == 4 * count;
  if (!adapted && args.size() != 2 * count) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("as many kernels and biases as results are needed"));
  }
  std::vector<Linear> linears;
  for (size_t i = 0; i < count; ++i) {
    const auto bias = *args.get<ffi::Buffer<ffi::F32>>(count + i);
    linears.push_back({args.get<ffi::AnyBuffer>(i)->untyped_data(), outs[i].untyped_data(), outs[i].dimensions()[1],
                       bias.element_count() ? bias.typed_data() : nullptr});
    if (!adapted) continue;
    const auto inner = *args.get<ffi::AnyBuffer>(2 * count + i), factors = *args.get<ffi::AnyBuffer>(3 * count + i);
    linears[i].added = {inner.untyped_data(), factors.untyped_data(), factors.dimensions()[2], slots.typed_data()};
  }
  return linears;
}

ffi::Error HandleProducts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slots, ffi::RemainingArgs args,
                          ffi::RemainingRets outs) {
  std::vector<ffi::AnyBuffer> results;
  for (size_t i = 0; i < outs.size(); ++i) results.push_back(**outs.get<ffi::AnyBuffer>(i));
  const auto linears = Linears(args, slots, results);
  if (!linears) return linears.error();
  return ByDtype(x, [&]<typename D>(D) {
    Products<D>(pool, Of<D>(x), *linears);
    return ffi::Error::Success();
  });
}

ffi::Error HandleReduced(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slots,
                         ffi::RemainingArgs factors, ffi::RemainingRets outs) {
  if (factors.size() != outs.size()) return ffi::Error::InvalidArgument("as many factors as results are needed");
  std::vector<Reduced> all;
  for (size_t i = 0; i < outs.size(); ++i) {
    const auto one = *factors.get<ffi::AnyBuffer>(i);
    all.push_back({one.untyped_data(), (*outs.get<ffi::AnyBuffer>(i))->untyped_data(), one.dimensions()[1]});
  }
  return ByDtype(x, [&]<typename D>(D) {
    Reduce<D>(pool, Of<D>(x), slots.typed_data(), all);
    return ffi::Error::Success();
  });
}

ffi::Error HandleGated(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> slots, ffi::RemainingArgs args,
                       std::string_view activation, ffi::Result<ffi::AnyBuffer> out) {
  const auto both = Linears(args, slots, {*out, *out});
  if (!both) return both.error();
  const Linear &gate = (*both)[0], &up = (*both)[1];
  return ByDtype(x, [&]<typename D>(D) {
    if (activation == "silu") {
      Gated<D, Silu>(pool, Of<D>(x), gate, up);
    } else if (activation == "gelu") {
      Gated<D, GeluByErf>(pool, Of<D>(x), gate, up);
    } else if (activation == "gelu_tanh") {
      Gated<D, Gelu>(pool, Of<D>(x), gate, up);
    } else {
      return ffi::Error::InvalidArgument("no such activation");
    }
    return ffi::Error::Success();
  });
}

// Of the first `states` rows of x.
ffi::Error OfHead(ffi::ThreadPool& pool, ffi::AnyBuffer x, ffi::AnyBuffer head, int64_t states, float softcap,
                  float scale, const Found& out, const Top& top) {
  const auto work = [&]<typename D>(D) {
    Input first = Of<D>(x);
    first.count = states;
    Normalizers<D>(pool, first, Of<D>(head), softcap, scale, out, top);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::F32) return work(Float32());
  if (x.element_type() == ffi::BF16) return work(BFloat16());
  return ffi::Error::InvalidArgument("a head is float32 or bfloat16");
}

ffi::Error HandleActivated(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::Buffer<ffi::F32> bias,
                           std::string_view activation, ffi::Result<ffi::AnyBuffer> out) {
  const Linear linear{kernel.untyped_data(), out->untyped_data(), out->dimensions()[1], bias.typed_data()};
  return ByDtype(x, [&]<typename D>(D) {
    if (activation == "gelu") {
      Activated<D, GeluByErf>(pool, Of<D>(x), linear);
    } else if (activation == "gelu_tanh") {
      Activated<D, Gelu>(pool, Of<D>(x), linear);
    } else {
      return ffi::Error::InvalidArgument("no such activation");
    }
    return ffi::Error::Success();
  });
}

ffi::Error HandleLayerNorms(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> more,
                            ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> bias, float eps,
                            ffi::ResultBuffer<ffi::F32> out) {
  LayerNorms(pool, x.typed_data(), more.element_count() ? more.typed_data() : nullptr, scale.typed_data(),
             bias.typed_data(), x.dimensions()[0], x.dimensions()[1], eps, out->typed_data());
  return ffi::Error::Success();
}

ffi::Error HandleNormalizers(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer head, float softcap,
                             ffi::ResultBuffer<ffi::F32> normalizers, ffi::ResultBuffer<ffi::S32> best,
                             ffi::ResultBuffer<ffi::F32> highest) {
  const Found out{normalizers->typed_data(), best->typed_data(), highest->typed_data()};
  return OfHead(pool, x, head, x.dimensions()[0], softcap, 1, out, Top{});
}

ffi::Error HandleTops(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer head, ffi::Buffer<ffi::S32> wanted,
                      ffi::Buffer<ffi::F32> scale, float softcap, ffi::ResultBuffer<ffi::F32> normalizers,
                      ffi::ResultBuffer<ffi::S32> ids, ffi::ResultBuffer<ffi::F32> logits) {
  const int64_t most = ids->dimensions()[1], count = std::clamp<int64_t>(wanted.typed_data()[0], 1, most);
  const int64_t states = std::clamp<int64_t>(wanted.typed_data()[1], 0, x.dimensions()[0]);
  const Top top{count, most, logits->typed_data(), ids->typed_data()};
  return OfHead(pool, x, head, states, softcap, scale.typed_data()[0], Found{normalizers->typed_data()}, top);
}

ffi::Error HandleDots(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                      ffi::ResultBuffer<ffi::F32> out) {
  Dots(pool, a.typed_data(), b.typed_data(), a.dimensions()[0], a.dimensions()[1], out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreProducts, HandleProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreReduced, HandleReduced,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreGated, HandleGated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Attr<std::string_view>("activation")
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreActivated, HandleActivated,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("activation")
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreLayerNorms, HandleLayerNorms,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("eps")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreNormalizers, HandleNormalizers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreTops, HandleTops,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("softcap")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreDots, HandleDots,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// Whether the processor multiplies bfloat16 faster than float32.
extern "C" int ScoreHasBFloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}
