// Attention of packed segments, each over a paged prefix and over itself, on a CPU: what model/attention.py describes, in
// one call. A query folds the keys it sees into a running softmax, 64 at a time (FlashAttention, arXiv 2205.14135,
// section 3.1), so that scores and weights never leave the first cache.
//
// A query's bits depend on nothing but the tokens before it: not on what else is in the call, and not on how many of
// these tokens are in the prefix. Keys come in the order of their positions in the sequence, in blocks that begin at
// multiples of 64, wherever they are stored; every sum runs in the order of the keys, and what is masked adds an exact
// zero.
//
// Sizes by the letters of model/__init__.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.h"

namespace {

constexpr int kKeys = 64;       // of one block
constexpr int64_t kSteps = 64;  // of one sum
constexpr int kTileRows = 768;  // queries that share a packed block: their running sums stay in the second cache
constexpr int64_t kAhead = 16;  // queries that are prefetched before they are packed
constexpr int64_t kLine = 64;   // bytes that memory hands out together
constexpr float kInfinity = std::numeric_limits<float>::infinity();

Floats Larger(Floats a, Floats b) { return a > b ? a : b; }

// One call's buffers and sizes.
struct Problem {
  const void *q, *k, *v;    // [Q, N, H], [M, K, H], [M, K, H]
  const void* pool;         // [pages, L, 2, K, page, H]
  const int32_t* segments;  // [M]
  const int32_t* prefixes;  // [M] which of the P prefixes each token sees
  const int32_t* reads;     // [Q] the tokens that the queries are of
  const int32_t* tables;    // [P, slots]
  const int32_t* lengths;   // [P] tokens of each prefix
  void* out;                // [Q, N, H]
  int64_t tokens, queries, heads, kv_heads, width, layers, page, slots;
  int64_t layer, window;
  float softcap;
  bool causal;  // otherwise a query sees the keys after it, too, and there are no prefixes

  int64_t groups() const { return heads / kv_heads; }
};

// A thread's work space for some queries under one key/value head.
template <typename D>
class Worker {
  using Stored = typename D::Stored;
  using Unit = typename D::Unit;

 public:
  explicit Worker(const Problem& problem) : p_(problem) {
    padded_ = (p_.width + kLanes - 1) / kLanes * kLanes;
    steps_ = p_.width / D::kPacked;
    const int64_t rows = std::max<int64_t>(kTileRows, p_.groups()) + 2 * kRows;
    queries_.resize(rows * steps_);
    keys_.resize(steps_ * kKeys);
    values_.resize(kKeys / D::kPacked * padded_);
    sums_.resize(rows * padded_);
    totals_.resize(rows * kLanes);
    highest_.resize(rows);
    positions_.resize(rows);
  }

  // Attends from queries first:last of one key/value head's group.
  void Run(int64_t head, int64_t first, int64_t last) {
    const int64_t groups = p_.groups(), all = (last - first) * groups;
    while (last > first && p_.segments[p_.reads[last - 1]] < 0) --last;  // padding sees nothing
    const int64_t rows = (last - first) * groups;
    const auto* q = static_cast<const Stored*>(p_.q);
    for (int64_t row = 0; row < rows; ++row) {
      const Stored* from = q + ((first + row / groups) * p_.heads + head * groups + row % groups) * p_.width;
      AskRow(from + kAhead * p_.heads * p_.width);
      for (int64_t step = 0; step < steps_; ++step) queries_[row * steps_ + step] = D::Pack(from + step * D::kPacked);
    }
    std::fill_n(queries_.begin() + rows * steps_, 2 * kRows * steps_, Unit{});
    std::fill_n(sums_.begin(), (rows + 2 * kRows) * padded_, 0.0f);
    std::fill_n(totals_.begin(), (rows + 2 * kRows) * kLanes, 0.0f);
    std::fill_n(highest_.begin(), rows + 2 * kRows, -kInfinity);
    std::fill_n(positions_.begin(), rows + 2 * kRows, -1);
    for (int64_t from = first; from < last;) from = Behind(head, first, from, last);
    Write(head, first, all);
  }

 private:
  // Queries of one segment, which follow each other.
  struct Segment {
    int64_t begin, end;    // their rows
    int64_t start, count;  // the segment's first token, and how many of its tokens they see
  };

  // Keys and values that are packed together, `count` from place `first` of the packed block on, and then folded into
  // rows begin:end with what is before them. The packed block begins at `position`.
  struct Block {
    const Stored *k, *v;
    int64_t stride, first, count, begin, end, position;
  };

  // Folds all keys into query `from` and into those after it that see the same prefix; returns the first that does not.
  int64_t Behind(int64_t head, int64_t first, int64_t from, int64_t last) {
    const int64_t groups = p_.groups(), number = p_.prefixes[p_.reads[from]], length = p_.lengths[number];
    segments_.clear();
    blocks_.clear();
    int64_t until = from;
    while (until < last && p_.prefixes[p_.reads[until]] == number) until = Collect(first, until, last, length);
    const int64_t shared = length / kKeys * kKeys;  // whole blocks, which all of these queries see
    int64_t key = std::max<int64_t>(length + 1 - p_.window, 0) / kKeys * kKeys;  // no query sees further back
    for (; key < shared; key += kKeys) {
      AddOfPrefix(head, number, key, kKeys, (from - first) * groups, (until - first) * groups);
    }
    // The block that the prefix ends in goes on with the segment's own keys: of that, only these are packed anew.
    const int64_t rest = length - shared, room = kKeys - rest;
    if (rest > 0) AddOfPrefix(head, number, shared, rest, 0, 0);
    for (const Segment& own : segments_) AddOwn(head, own, 0, std::min(room, own.count), shared, rest);
    for (const Segment& own : segments_) {
      for (int64_t done = room; done < own.count; done += kKeys) {
        AddOwn(head, own, done, std::min<int64_t>(kKeys, own.count - done), length + done, 0);
      }
    }
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const Block& block = blocks_[i];
      Pack(block.k, block.v, block.stride, block.first, block.count);
      Fold(block.begin, block.end, block.position, static_cast<int>(block.first + block.count),
           i + 1 < blocks_.size() ? blocks_[i + 1] : Block{});
    }
    return until;
  }

  // Adds to `segments_` that of query `from` and of those after it that are of the same; returns the first that is not.
  int64_t Collect(int64_t first, int64_t from, int64_t last, int64_t length) {
    const int64_t groups = p_.groups(), token = p_.reads[from];
    const int32_t segment = p_.segments[token];
    int64_t start = token, until = from, latest = token;
    while (start > 0 && p_.segments[start - 1] == segment) --start;
    for (; until < last && p_.segments[p_.reads[until]] == segment; ++until) {
      const int64_t place = p_.reads[until];
      latest = std::max(latest, place);
      const int64_t position = segment < 0 ? -1 : length + place - start;  // padding sees nothing
      std::fill_n(positions_.begin() + (until - first) * groups, groups, static_cast<int32_t>(position));
    }
    while (!p_.causal && latest + 1 < p_.tokens && p_.segments[latest + 1] == segment) ++latest;
    if (segment >= 0) segments_.push_back({(from - first) * groups, (until - first) * groups, start, latest + 1 - start});
    return until;
  }

  // Adds `count` of a prefix's keys from `key` on, which a page holds one after the other.
  void AddOfPrefix(int64_t head, int64_t number, int64_t key, int64_t count, int64_t begin, int64_t end) {
    const int64_t page = p_.tables[number * p_.slots + key / p_.page];
    const int64_t half = p_.kv_heads * p_.page * p_.width;  // from keys to values
    const Stored* k = static_cast<const Stored*>(p_.pool) +
                      ((page * p_.layers + p_.layer) * 2 * p_.kv_heads + head) * p_.page * p_.width +
                      key % p_.page * p_.width;
    blocks_.push_back({k, k + half, p_.width, 0, count, begin, end, key});
  }

  // Adds `count` of the segment's own keys, from its `done`-th on, which stand in the block at `position` after `rest`
  // others.
  void AddOwn(int64_t head, const Segment& own, int64_t done, int64_t count, int64_t position, int64_t rest) {
    const int64_t stride = p_.kv_heads * p_.width, at = (own.start + done) * stride + head * p_.width;
    blocks_.push_back({static_cast<const Stored*>(p_.k) + at, static_cast<const Stored*>(p_.v) + at, stride, rest, count,
                       own.begin, own.end, position});
  }

  // Prefetches what a head has of one token.
  void AskRow(const Stored* row) {
    for (int64_t at = 0; at < p_.width; at += kLine / sizeof(Stored)) __builtin_prefetch(row + at, 0, 2);
  }

  // `count` keys [step][key] and values [key / kPacked][channel], as the micro-kernel reads them, into the block from
  // place `first` on; what else is in it stays. A value that is not finite becomes 0: weighted by the 0 of a query that
  // may not see it, it would spoil that query all the same.
  void Pack(const Stored* k, const Stored* v, int64_t stride, int64_t first, int64_t count) {
    for (int64_t key = 0; key < count; ++key) {
      for (int64_t step = 0; step < steps_; ++step) {
        keys_[step * kKeys + first + key] = D::Pack(k + key * stride + step * D::kPacked);
      }
    }
    for (int64_t key = 0; key < count; ++key) {
      const int64_t place = first + key;
      Unit* to = &values_[place / D::kPacked * padded_];
      for (int64_t channel = 0; channel < p_.width; ++channel) {
        const Stored value = v[key * stride + channel];
        D::Put(&to[channel], place % D::kPacked, std::isfinite(D::Wide(value)) ? value : Stored{});
      }
    }
  }

  // Folds the first `count` keys of the packed block into the running softmax of rows begin:end. The block begins at
  // position `block`; a query sees what is in its window, up to its own position or as far beyond it. What is packed
  // `next` is prefetched on the way: these loads come one by one from far apart, and packing would wait for each. Within
  // its caller GCC has too few registers for the sums, and takes 1.7 times as long.
  [[gnu::noinline]] void Fold(int64_t begin, int64_t end, int64_t block, int count, const Block& next) {
    const int64_t share = (next.count * kRows + end - begin - 1) / std::max<int64_t>(end - begin, 1);
    int64_t asked = 0;
    alignas(64) float scores[kRows][kKeys];
    alignas(64) Unit weights[kRows][kKeys / D::kPacked];
    for (int64_t row = begin; row < end; row += kRows) {
      for (const int64_t more = std::min(asked + share, next.count); asked < more; ++asked) {
        AskRow(next.k + asked * next.stride);
        AskRow(next.v + asked * next.stride);
      }
      int from[kRows], until[kRows], most = 0, least = kKeys, latest_from = 0;
      for (int i = 0; i < kRows; ++i) {
        const int64_t after = positions_[row + i] + 1 - block, behind = p_.causal ? after : after + p_.window - 1;
        until[i] = row + i < end ? static_cast<int>(std::clamp<int64_t>(behind, 0, count)) : 0;
        from[i] = static_cast<int>(std::clamp<int64_t>(after - p_.window, 0, kKeys));
        most = std::max(most, from[i] < until[i] ? until[i] : 0);
        least = std::min(least, until[i]);
        latest_from = std::max(latest_from, from[i]);
      }
      if (most == 0) continue;
      const int vectors = (most + kLanes - 1) / kLanes;
      const Unit* queries[kRows];
      for (int i = 0; i < kRows; ++i) queries[i] = &queries_[(row + i) * steps_];
      const float nothing[kRows] = {};
      Multiply(queries, keys_.data(), kKeys, steps_, nothing, &scores[0][0], kKeys, vectors);
      if (p_.softcap > 0) {
        for (int i = 0; i < kRows; ++i) {
          for (int at = 0; at < vectors * kLanes; at += kLanes) {
            Store(&scores[i][at], p_.softcap * HyperbolicTangent(Load(&scores[i][at]) / p_.softcap));
          }
        }
      }
      if (least < vectors * kLanes || latest_from > 0) {
        for (int i = 0; i < kRows; ++i) {
          for (int key = 0; key < vectors * kLanes; ++key) {
            if (key < from[i] || key >= until[i]) scores[i][key] = -kInfinity;
          }
        }
      }
      float change[(kRows + kLanes - 1) / kLanes * kLanes] = {}, highest[kRows];
      for (int i = 0; i < kRows; ++i) {
        Floats most_of_lane = Load(&scores[i][0]);
        for (int at = kLanes; at < vectors * kLanes; at += kLanes) {
          most_of_lane = Larger(Load(&scores[i][at]), most_of_lane);
        }
        const float before = highest_[row + i], now = std::max(before, Across(most_of_lane, Larger)[0]);
        highest[i] = now == -kInfinity ? 0.0f : now;  // no key seen yet: weights of 0, not of NaN
        change[i] = before - highest[i];
        highest_[row + i] = now;
      }
      for (int at = 0; at < kRows; at += kLanes) Store(&change[at], Exponential(Load(&change[at])));
      for (int i = 0; i < kRows; ++i) {
        Floats total = Load(&totals_[(row + i) * kLanes]) * change[i];
        for (int at = 0; at < vectors * kLanes; at += kLanes) {
          const Floats weight = Exponential(Load(&scores[i][at]) - highest[i]);
          total += D::Round(&weights[i][at / D::kPacked], weight);
        }
        Store(&totals_[(row + i) * kLanes], total);
      }
      const Unit* weighing[kRows];
      for (int i = 0; i < kRows; ++i) weighing[i] = weights[i];
      Multiply(weighing, values_.data(), padded_, (most + D::kPacked - 1) / D::kPacked, change,
               &sums_[row * padded_], padded_, static_cast<int>(padded_ / kLanes));
    }
  }

  // sums = kept * sums + a * b, where sums is [kRows, vectors * kLanes], a [kRows, steps], b [steps, vectors * kLanes],
  // and kept [kRows]: 0 for sums that are not yet set. Summed in parts of kSteps: long sums are more exact so.
  static void Multiply(const Unit* const* a, const Unit* b, int64_t b_stride, int64_t steps, const float* kept,
                       float* sums, int64_t sums_stride, int vectors) {
    float all[kRows];
    std::fill_n(all, kRows, 1.0f);
    for (int64_t step = 0; step < steps; step += kSteps) {
      const Operands part{a, b + step * b_stride, b_stride, step, std::min(step + kSteps, steps)};
      const Sums to{step == 0 ? kept : all, sums, sums_stride};
      int at = 0;
      for (; at + kVectors <= vectors; at += kVectors) Tile<kVectors>(part, to, at * kLanes);
      if constexpr (kVectors > 2) {
        if (vectors - at == 3) Tile<3>(part, to, at * kLanes);
        if (vectors - at == 2) Tile<2>(part, to, at * kLanes);
      }
      if (vectors - at == 1) Tile<1>(part, to, at * kLanes);
    }
  }

  struct Operands {
    const Unit* const* a;
    const Unit* b;  // at step `begin`
    int64_t b_stride, begin, end;
  };

  struct Sums {
    const float* kept;
    float* sums;
    int64_t stride;
  };

  template <int vectors>
  static void Tile(const Operands& of, const Sums& to, int column) {
    Floats tile[kRows][vectors] = {};
    const Unit* b = of.b + column;
    for (int64_t step = of.begin; step < of.end; ++step, b += of.b_stride) {
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < vectors; ++j) tile[i][j] = D::Add(tile[i][j], of.a[i] + step, b + j * kLanes);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < vectors; ++j) {
        float* sum = to.sums + i * to.stride + column + j * kLanes;
        Store(sum, to.kept[i] == 0 ? tile[i][j] : Fused(All(to.kept[i]), Load(sum), tile[i][j]));
      }
    }
  }

  // Padding saw no key: it gets 0.
  void Write(int64_t head, int64_t first, int64_t rows) {
    const int64_t groups = p_.groups();
    auto* out = static_cast<Stored*>(p_.out);
    for (int64_t row = 0; row < rows; ++row) {
      Stored* to = out + ((first + row / groups) * p_.heads + head * groups + row % groups) * p_.width;
      const bool padding = p_.segments[p_.reads[first + row / groups]] < 0;
      const float total = Across(Load(&totals_[row * kLanes]), Plus)[0];
      for (int64_t channel = 0; channel < p_.width; ++channel) {
        to[channel] = padding ? Stored{} : D::Narrow(sums_[row * padded_ + channel] / total);
      }
    }
  }

  const Problem p_;
  int64_t padded_, steps_;
  std::vector<Unit> queries_, keys_, values_;
  std::vector<float> sums_, totals_, highest_;  // running: weighted values, sums by lane, and maxima
  std::vector<int32_t> positions_;              // of each query in its sequence
  std::vector<Segment> segments_;               // of the queries at hand
  std::vector<Block> blocks_;                   // what these see
};

template <typename D>
void Attend(const Problem& problem, ffi::ThreadPool& pool) {
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t most = std::max<int64_t>(1, kTileRows / problem.groups());
  const int64_t fair = problem.queries * problem.kv_heads / (8 * threads);
  const int64_t tile = std::clamp<int64_t>(fair, std::min<int64_t>(most, 16), most);
  const int64_t tiles = (problem.queries + tile - 1) / tile;
  Share(pool, tiles * problem.kv_heads, [problem, tile] {
    return [problem, tile, worker = Worker<D>(problem)](int64_t unit) mutable {
      const int64_t first = unit / problem.kv_heads * tile;
      worker.Run(unit % problem.kv_heads, first, std::min(first + tile, problem.queries));
    };
  });
}

ffi::Error Handle(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::S32> segments, ffi::Buffer<ffi::S32> prefixes, ffi::AnyBuffer pages,
                  ffi::Buffer<ffi::S32> tables, ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> layer,
                  ffi::Buffer<ffi::S32> window, ffi::Buffer<ffi::S32> reads, float softcap, bool causal,
                  ffi::Result<ffi::AnyBuffer> out) {
  const auto of_queries = q.dimensions(), of_keys = k.dimensions(), of_pages = pages.dimensions();
  if (of_pages[4] % kKeys != 0) return ffi::Error::InvalidArgument("a page must hold a multiple of 64 tokens");
  if (of_queries[2] % 2 != 0) return ffi::Error::InvalidArgument("a head's width must be even");
  const Problem problem{
      .q = q.untyped_data(),
      .k = k.untyped_data(),
      .v = v.untyped_data(),
      .pool = pages.untyped_data(),
      .segments = segments.typed_data(),
      .prefixes = prefixes.typed_data(),
      .reads = reads.typed_data(),
      .tables = tables.typed_data(),
      .lengths = lengths.typed_data(),
      .out = out->untyped_data(),
      .tokens = of_keys[0],
      .queries = of_queries[0],
      .heads = of_queries[1],
      .kv_heads = of_keys[1],
      .width = of_queries[2],
      .layers = of_pages[1],
      .page = of_pages[4],
      .slots = tables.dimensions()[1],
      .layer = *layer.typed_data(),
      .window = *window.typed_data(),
      .softcap = softcap,
      .causal = causal,
  };
  if (q.element_type() == ffi::F32) {
    Attend<Float32>(problem, pool);
  } else if (q.element_type() == ffi::BF16) {
    Attend<BFloat16>(problem, pool);
  } else {
    return ffi::Error::InvalidArgument("attention takes float32 or bfloat16");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreAttention, Handle,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("softcap")
                                  .Attr<bool>("causal")
                                  .Ret<ffi::AnyBuffer>());
