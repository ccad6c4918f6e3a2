// The gated delta rule of packed segments, each from the state that its prefix left, on a CPU: what model/delta.py
// describes, in one call, with the short convolution before it.
//
// A token's bits depend on nothing but the tokens before it: states follow each other token by token, so it does not
// matter where a sequence is cut into prefix, chunks and segment. A head's state stays in the second cache, and the
// columns at hand in the first. That takes fewer operations than the chunked algorithm, which pays where matmuls are
// much faster than what lies in memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace {

constexpr int64_t kTokens = 32;  // whose queries, keys and values are prepared together
constexpr int kColumns = 4;      // vectors of a state's columns that are walked together
constexpr float kLeast = 1e-6f;  // added to the squared length of a query or key

// One call's buffers and sizes. A snapshot is in a slot, for each layer and each of its parts.
struct Problem {
  const float* mixed;         // [M, C]: queries and keys of all key heads, then values of all value heads
  const float* decays;        // [M, V], logarithms
  const float* rates;         // [M, V]
  const float* taps;          // [T, C] of the convolution; the last one is of the token itself
  const int32_t* segments;    // [M]
  const int32_t* prefixes;    // [M] which of the P prefixes each token sees
  const int32_t* slots;       // [P, 2]: where a prefix's snapshot is, and where the segment's own goes
  const float* inputs;        // [slots, L, parts, T - 1, C]
  const float* memories;      // [slots, L, parts, V, H, W]
  float *inputs_kept, *memories_kept;  // the same arrays, to be written; or none
  float* out;                 // [M, V, W]
  int64_t tokens, channels, before, keys, values, key_width, width, layers, parts, layer, part;

  int64_t place(int64_t slot) const { return (slot * layers + layer) * parts + part; }
  int64_t input(int64_t slot) const { return place(slot) * before * channels; }
  int64_t memory(int64_t slot, int64_t head) const { return (place(slot) * values + head) * key_width * width; }
};

struct Segment {
  int64_t first, last, from, to;  // its tokens, and the slots of what it begins with and leaves
};

std::vector<Segment> Segments(const Problem& p) {
  std::vector<Segment> found;
  for (int64_t token = 0; token < p.tokens;) {
    const int64_t first = token;
    while (token < p.tokens && p.segments[token] == p.segments[first]) ++token;
    const int32_t* slots = p.slots + 2 * p.prefixes[first];
    if (p.segments[first] >= 0) found.push_back({first, token, slots[0], slots[1]});
  }
  return found;
}

Floats Silu(Floats x) {
  const Floats e = Exponential(x < 0.0f ? x : -x);
  return x * (x < 0.0f ? e : All(1.0f)) / (1.0f + e);
}

// A thread's work space for one segment under one value head.
class Worker {
 public:
  explicit Worker(const Problem& problem) : p_(problem) {
    padded_key_ = Padded(p_.key_width);
    padded_ = Padded(p_.width);
    queries_.resize(kTokens * padded_key_);
    keys_.resize(kTokens * padded_key_);
    values_.resize(kTokens * padded_);
    out_.resize(padded_);
    memory_.resize(p_.key_width * padded_);
  }

  void Run(int64_t head, const Segment& segment) {
    const float* from = p_.memories + p_.memory(segment.from, head);
    for (int64_t row = 0; row < p_.key_width; ++row) std::copy_n(from + row * p_.width, p_.width, &memory_[row * padded_]);
    const int64_t group = head / (p_.values / p_.keys), of_keys = p_.keys * p_.key_width;
    for (int64_t first = segment.first; first < segment.last; first += kTokens) {
      const int64_t count = std::min(kTokens, segment.last - first);
      for (int64_t i = 0; i < count; ++i) {
        Mix(segment, first + i, group * p_.key_width, p_.key_width, &queries_[i * padded_key_]);
        Mix(segment, first + i, of_keys + group * p_.key_width, p_.key_width, &keys_[i * padded_key_]);
        Mix(segment, first + i, 2 * of_keys + head * p_.width, p_.width, &values_[i * padded_]);
        Normalize(&queries_[i * padded_key_], 1.0f / std::sqrt(static_cast<float>(p_.key_width)));
        Normalize(&keys_[i * padded_key_], 1.0f);
      }
      int64_t column = 0;
      for (; column + kColumns * kLanes <= padded_; column += kColumns * kLanes) Walk<kColumns>(head, first, count, column);
      for (; column < padded_; column += kLanes) Walk<1>(head, first, count, column);
    }
    if (p_.memories_kept == nullptr || segment.to == 0) return;
    float* to = p_.memories_kept + p_.memory(segment.to, head);
    for (int64_t row = 0; row < p_.key_width; ++row) std::copy_n(&memory_[row * padded_], p_.width, to + row * p_.width);
  }

 private:
  static int64_t Padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

  // A token's channels after the convolution and its activation; zeros behind them.
  void Mix(const Segment& segment, int64_t token, int64_t channel, int64_t width, float* to) const {
    for (int64_t at = 0; at < width; at += kLanes) {
      Floats sum = {};
      for (int64_t tap = 0; tap <= p_.before; ++tap) {
        const int64_t source = token - p_.before + tap;
        const float* row = source >= segment.first
                               ? p_.mixed + source * p_.channels
                               : p_.inputs + p_.input(segment.from) + (source - segment.first + p_.before) * p_.channels;
        const int64_t left = width - at;
        sum = Fused(Part(p_.taps + tap * p_.channels + channel + at, left), Part(row + channel + at, left), sum);
      }
      Store(to + at, Silu(sum));
    }
  }

  static Floats Part(const float* from, int64_t left) {
    if (left >= kLanes) return Load(from);
    Floats part = {};
    for (int64_t lane = 0; lane < left; ++lane) part[lane] = from[lane];
    return part;
  }

  void Normalize(float* x, float factor) const {
    Floats squares = {};
    for (int64_t at = 0; at < padded_key_; at += kLanes) squares = Fused(Load(x + at), Load(x + at), squares);
    const float scale = factor / std::sqrt(Across(squares, Plus)[0] + kLeast);
    for (int64_t at = 0; at < padded_key_; at += kLanes) Store(x + at, Load(x + at) * scale);
  }

  // The state's columns from `column` on through `count` tokens.
  template <int vectors>
  void Walk(int64_t head, int64_t first, int64_t count, int64_t column) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + i, number = token * p_.values + head;
      const float decay = std::exp(p_.decays[number]), rate = p_.rates[number];
      const float *key = &keys_[i * padded_key_], *query = &queries_[i * padded_key_];
      Floats known[2][vectors] = {}, change[vectors], read[2][vectors] = {};
      float* row = memory_.data() + column;
      for (int64_t at = 0; at < p_.key_width; ++at, row += padded_) {
        for (int j = 0; j < vectors; ++j) known[at % 2][j] = Fused(All(key[at]), Load(row + j * kLanes), known[at % 2][j]);
      }
      for (int j = 0; j < vectors; ++j) {
        change[j] = rate * (Load(&values_[i * padded_ + column + j * kLanes]) - decay * (known[0][j] + known[1][j]));
      }
      row = memory_.data() + column;
      for (int64_t at = 0; at < p_.key_width; ++at, row += padded_) {
        for (int j = 0; j < vectors; ++j) {
          const Floats now = Fused(All(key[at]), change[j], decay * Load(row + j * kLanes));
          Store(row + j * kLanes, now);
          read[at % 2][j] = Fused(All(query[at]), now, read[at % 2][j]);
        }
      }
      for (int j = 0; j < vectors; ++j) Store(&out_[column + j * kLanes], read[0][j] + read[1][j]);
      const int64_t real = std::min<int64_t>(p_.width - column, vectors * kLanes);
      if (real > 0) std::copy_n(&out_[column], real, p_.out + number * p_.width + column);
    }
  }

  const Problem p_;
  int64_t padded_key_, padded_;
  std::vector<float> queries_, keys_, values_, out_, memory_;
};

void Run(const Problem& p, ffi::ThreadPool& pool) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    if (p.segments[token] < 0) std::fill_n(p.out + token * p.values * p.width, p.values * p.width, 0.0f);
  }
  const auto segments = std::make_shared<const std::vector<Segment>>(Segments(p));
  // All segments under one head follow each other: what they begin with is then in a cache.
  Share(pool, static_cast<int64_t>(segments->size()) * p.values, [=] {
    return [=, worker = Worker(p)](int64_t unit) mutable {
      const auto count = static_cast<int64_t>(segments->size());
      worker.Run(unit / count, (*segments)[unit % count]);
    };
  });
  if (p.inputs_kept == nullptr) return;
  for (const Segment& segment : *segments) {
    if (segment.to == 0) continue;
    const int64_t length = segment.last - segment.first;
    for (int64_t row = 0; row < p.before; ++row) {  // ascending: where both slots are one, what is read is not yet written
      const int64_t source = length - p.before + row;
      const float* from = source >= 0 ? p.mixed + (segment.first + source) * p.channels
                                      : p.inputs + p.input(segment.from) + (length + row) * p.channels;
      std::copy_n(from, p.channels, p.inputs_kept + p.input(segment.to) + row * p.channels);
    }
  }
}

struct Given {
  ffi::Buffer<ffi::F32> mixed, decays, rates, taps;
  ffi::Buffer<ffi::S32> segments, prefixes, slots;
  ffi::Buffer<ffi::F32> inputs, memories;
  ffi::Buffer<ffi::S32> layer;
};

Problem Stated(const Given& given, int64_t part, ffi::Result<ffi::Buffer<ffi::F32>>& out) {
  const auto of_inputs = given.inputs.dimensions(), of_memories = given.memories.dimensions();
  const int64_t channels = given.mixed.dimensions()[1], values = of_memories[3];
  const int64_t key_width = of_memories[4], width = of_memories[5];
  return {
      .mixed = given.mixed.typed_data(),
      .decays = given.decays.typed_data(),
      .rates = given.rates.typed_data(),
      .taps = given.taps.typed_data(),
      .segments = given.segments.typed_data(),
      .prefixes = given.prefixes.typed_data(),
      .slots = given.slots.typed_data(),
      .inputs = given.inputs.typed_data(),
      .memories = given.memories.typed_data(),
      .inputs_kept = nullptr,
      .memories_kept = nullptr,
      .out = out->typed_data(),
      .tokens = given.mixed.dimensions()[0],
      .channels = channels,
      .before = of_inputs[3],
      .keys = (channels - values * width) / (2 * key_width),
      .values = values,
      .key_width = key_width,
      .width = width,
      .layers = of_inputs[1],
      .parts = of_inputs[2],
      .layer = *given.layer.typed_data(),
      .part = part,
  };
}

ffi::Error HandleRead(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> mixed, ffi::Buffer<ffi::F32> decays,
                      ffi::Buffer<ffi::F32> rates, ffi::Buffer<ffi::F32> taps, ffi::Buffer<ffi::S32> segments,
                      ffi::Buffer<ffi::S32> prefixes, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::F32> inputs,
                      ffi::Buffer<ffi::F32> memories, ffi::Buffer<ffi::S32> layer, int64_t part,
                      ffi::Result<ffi::Buffer<ffi::F32>> out) {
  Run(Stated({mixed, decays, rates, taps, segments, prefixes, slots, inputs, memories, layer}, part, out), pool);
  return ffi::Error::Success();
}

ffi::Error HandleKeep(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> mixed, ffi::Buffer<ffi::F32> decays,
                      ffi::Buffer<ffi::F32> rates, ffi::Buffer<ffi::F32> taps, ffi::Buffer<ffi::S32> segments,
                      ffi::Buffer<ffi::S32> prefixes, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::F32> inputs,
                      ffi::Buffer<ffi::F32> memories, ffi::Buffer<ffi::S32> layer, int64_t part,
                      ffi::Result<ffi::Buffer<ffi::F32>> out, ffi::Result<ffi::Buffer<ffi::F32>> inputs_kept,
                      ffi::Result<ffi::Buffer<ffi::F32>> memories_kept) {
  if (inputs.typed_data() != inputs_kept->typed_data() || memories.typed_data() != memories_kept->typed_data()) {
    return ffi::Error::InvalidArgument("snapshots are written where they lie");
  }
  Problem p = Stated({mixed, decays, rates, taps, segments, prefixes, slots, inputs, memories, layer}, part, out);
  p.inputs_kept = inputs_kept->typed_data();
  p.memories_kept = memories_kept->typed_data();
  Run(p, pool);
  return ffi::Error::Success();
}

auto Arguments() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::F32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Attr<int64_t>("part")
      .Ret<ffi::Buffer<ffi::F32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreDelta, HandleRead, Arguments());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScoreDeltaKept, HandleKeep,
                              Arguments().Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
