// Keys and values of a prefill into their pages, on a CPU: what model/computations.py's `write` describes, in one call.
// XLA would stack the layers' parts and turn them first, on one core.
//
// Sizes by the letters of model/__init__.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace {

// Tokens start:start+length of a call, which belong into page `page` from `offset` on.
struct Span {
  int32_t page, offset, start, length;
};

struct Problem {
  char* pool;                      // [pages, L, 2, K, page, H]
  std::vector<const char*> parts;  // of each layer [2, M, K, H]
  std::vector<Span> spans;
  int64_t tokens, kv_heads, page, row;  // a row is the bytes of one head
};

// One span of one layer's keys or values.
void Copy(const Problem& p, const Span& span, int64_t layer, int64_t half) {
  const int64_t layers = static_cast<int64_t>(p.parts.size());
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    char* to = p.pool + ((((span.page * layers + layer) * 2 + half) * p.kv_heads + head) * p.page + span.offset) * p.row;
    const char* from = p.parts[layer] + ((half * p.tokens + span.start) * p.kv_heads + head) * p.row;
    for (int64_t token = 0; token < span.length; ++token) {
      std::memcpy(to + token * p.row, from + token * p.kv_heads * p.row, p.row);
    }
  }
}

ffi::Error Handle(ffi::ThreadPool pool, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> spans, ffi::Buffer<ffi::S32> count,
                  ffi::RemainingArgs parts, ffi::Result<ffi::AnyBuffer> out) {
  if (pages.untyped_data() != out->untyped_data()) return ffi::Error::InvalidArgument("the pool is written in place");
  const auto sizes = pages.dimensions(), of_spans = spans.dimensions();
  const auto first = parts.get<ffi::AnyBuffer>(0);
  if (!first || static_cast<int64_t>(parts.size()) != sizes[1] || of_spans[1] != 4) {
    return ffi::Error::InvalidArgument("keys and values of each layer are needed, and spans of four numbers");
  }
  const int64_t row = sizes[5] * static_cast<int64_t>(ffi::ByteWidth(pages.element_type()));
  Problem problem{static_cast<char*>(out->untyped_data()), {}, {}, first->dimensions()[1], sizes[3], sizes[4], row};
  for (size_t i = 0; i < parts.size(); ++i) {
    problem.parts.push_back(static_cast<const char*>(parts.get<ffi::AnyBuffer>(i)->untyped_data()));
  }
  const auto* all = reinterpret_cast<const Span*>(spans.typed_data());
  problem.spans.assign(all, all + std::min<int64_t>(*count.typed_data(), of_spans[0]));
  const int64_t of_span = 2 * sizes[1];
  Share(pool, static_cast<int64_t>(problem.spans.size()) * of_span, [problem, of_span] {
    return [&problem, of_span](int64_t unit) {
      Copy(problem, problem.spans[unit / of_span], unit % of_span / 2, unit % 2);
    };
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(ScorePages, Handle,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
