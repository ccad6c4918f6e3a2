// What the CPU kernels share: vectors, how each dtype is multiplied, and how threads share a call. Each source that
// includes this is compiled by itself for one machine, model/cpu/build.py.
//
// "Lanes" are of one vector register.

#ifndef SCORE_KERNELS_CPU_H_
#define SCORE_KERNELS_CPU_H_

#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // kRows x kVectors sums of one tile, of 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kVectors = 2;
#endif
constexpr int kRows = 6;

using Floats = float __attribute__((vector_size(4 * kLanes), aligned(4)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes), aligned(4)));

Floats All(float x) { return x - Floats{}; }
Floats Load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
void Store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }

// a * b + sum, rounded once where the processor can. Nothing else is fused, see model/cpu/build.py: GCC fuses the two in
// some copies of a loop and not in others, by what is faster, and a row's bits would depend on what is beside it.
Floats Fused(Floats a, Floats b, Floats sum) {
#if defined(__AVX512F__)
  return std::bit_cast<Floats>(
      _mm512_fmadd_ps(std::bit_cast<__m512>(a), std::bit_cast<__m512>(b), std::bit_cast<__m512>(sum)));
#elif defined(__FMA__)
  return std::bit_cast<Floats>(
      _mm256_fmadd_ps(std::bit_cast<__m256>(a), std::bit_cast<__m256>(b), std::bit_cast<__m256>(sum)));
#elif defined(__aarch64__)
  return vfmaq_f32(sum, a, b);
#else
  return a * b + sum;
#endif
}

template <int distance, int... lane>
Floats Swapped(Floats x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, (lane ^ distance)...);
}

// In every lane what `join` makes of all of them, in pairs, then pairs of pairs.
template <int distance = kLanes / 2, typename Join>
Floats Across(Floats x, Join join) {
  x = join(x, Swapped<distance>(x, std::make_integer_sequence<int, kLanes>()));
  if constexpr (distance > 1) x = Across<distance / 2>(x, join);
  return x;
}

Floats Plus(Floats a, Floats b) { return a + b; }

float Widened(uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); }

// To the nearest, ties to even; NaN stays NaN.
uint16_t Narrowed(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return (bits >> 16) | 0x40;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// exp(x) for x <= 0, to 2e-7 + 1e-7 |x| of itself; 0 where that is below the smallest normal number; NaN for NaN.
Floats Exponential(Floats x) {
  const Floats t = x * 1.44269504f;
  const Floats least = All(-127.0f), kept = least > t ? least : t;
  // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the lowest bits; 127 more, and they are 2^n's exponent.
  const Floats magic = All(12582912.0f + 127.0f), shifted = kept + magic, f = kept - (shifted - magic);
  Floats p = All(1.3264723896e-3f);  // 2^f for -0.5 <= f <= 0.5: minimax of (2^f - 1) / f, relative error 9.2e-8
  p = Fused(p, f, All(9.6715128699e-3f));
  p = Fused(p, f, All(5.5507337542e-2f));
  p = Fused(p, f, All(2.4022242080e-1f));
  p = Fused(p, f, All(6.9314697759e-1f));
  p = Fused(p, f, All(1.0f));
  return p * std::bit_cast<Floats>(std::bit_cast<Ints>(shifted) << 23);
}

Floats HyperbolicTangent(Floats x) {
  const Floats e = Exponential(x < 0.0f ? 2.0f * x : -2.0f * x);
  const Floats magnitude = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -magnitude : magnitude;
}

// How a dtype is multiplied. A Unit is what one step of a product takes of each operand: kPacked neighbours.
struct Float32 {
  using Stored = float;
  using Unit = float;
  static constexpr int kPacked = 1;
  static float Wide(Stored x) { return x; }
  static Stored Narrow(float x) { return x; }
  static Unit Pack(const Stored* x) { return *x; }
  static void Put(Unit* to, int64_t, Stored x) { *to = x; }  // as one of those that a Unit packs
  static Floats Add(Floats sum, const Unit* a, const Unit* b) { return Fused(All(*a), Load(b), sum); }
  // Stores weights as operands, and gives them as they were stored.
  static Floats Round(float* to, Floats x) {
    Store(to, x);
    return x;
  }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Stored = uint16_t;
  using Unit = uint32_t;
  static constexpr int kPacked = 2;
  static float Wide(Stored x) { return Widened(x); }
  static Stored Narrow(float x) { return Narrowed(x); }
  static Unit Pack(const Stored* x) { return x[0] | uint32_t{x[1]} << 16; }
  static void Put(Unit* to, int64_t part, Stored x) {
    *to = part == 0 ? (*to & 0xffff0000) | x : (*to & 0xffff) | uint32_t{x} << 16;
  }
  static Floats Add(Floats sum, const Unit* a, const Unit* b) {
    const __m512i all = _mm512_set1_epi32(static_cast<int>(*a));
    return std::bit_cast<Floats>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(all),
                                                  std::bit_cast<__m512bh>(_mm512_loadu_si512(b))));
  }
  static Floats Round(Unit* to, Floats x) {
    const __m256i bits = std::bit_cast<__m256i>(_mm512_cvtneps_pbh(std::bit_cast<__m512>(x)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
    return std::bit_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};
#else
struct BFloat16 : Float32 {  // multiplied as float32
  using Stored = uint16_t;
  static float Wide(Stored x) { return Widened(x); }
  static Stored Narrow(float x) { return Narrowed(x); }
  static Unit Pack(const Stored* x) { return Widened(*x); }
  static void Put(Unit* to, int64_t, Stored x) { *to = Widened(x); }
  static Floats Round(float* to, Floats x) {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = Widened(Narrowed(x[lane]));
    return Load(to);
  }
};
#endif

constexpr int kSpins = 10000;  // about 0.2 ms: to be woken takes a tenth of that and more

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// What the threads of one call share. `make` makes what a thread does its units with. Those of the pool may be busy with
// other work and come late, or when all is done: the caller works too, and waits only for what others have begun.
template <typename Make>
class Shared {
 public:
  Shared(int64_t units, Make make) : units_(units), make_(make) {}

  void Work() {
    if (next_.load() >= units_) return;
    auto run = make_();
    int64_t done = 0;
    for (int64_t unit; (unit = next_.fetch_add(1)) < units_; ++done) run(unit);
    const std::lock_guard<std::mutex> lock(mutex_);
    done_ += done;
    if (done_ == units_) finished_.notify_all();
  }

  void Wait() {
    for (int spin = 0; spin < kSpins; ++spin) {
      if (done_ == units_) return;
      Pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    finished_.wait(lock, [this] { return done_ == units_; });
  }

 private:
  const int64_t units_;
  const Make make_;
  std::atomic<int64_t> next_{0}, done_{0};
  std::mutex mutex_;
  std::condition_variable finished_;
};

// Runs units 0:units on all threads.
template <typename Make>
void Share(ffi::ThreadPool& pool, int64_t units, Make make) {
  auto shared = std::make_shared<Shared<Make>>(units, make);
  for (int64_t other = 1; other < std::min(pool.num_threads(), units); ++other) {
    pool.Schedule([shared] { shared->Work(); });
  }
  shared->Work();
  shared->Wait();
}

}  // namespace

#endif  // SCORE_KERNELS_CPU_H_
