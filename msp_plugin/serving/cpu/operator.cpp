// The operator msp_plugin::bitmask_linear: x times a transposed weight that stays packed (expand.h), on torch's threads.
//
// Up to kTokens inputs (kBeforeTiles with AMX) are multiplied straight from the packed weights. More of them share the
// cost of unpacking: tiles of rows are unpacked into cache and multiplied on AMX tiles (expand_amx.h), or by oneDNN through torch.
//
// Shape legend: O out_features, I in_features, T tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <type_traits>

#include "expand.h"

namespace {

using at::Tensor;
using msp::Packed;
using msp::kFewTokens, msp::kPiece, msp::kTileInputs;

// Rows of a tile and columns unpacked at a time: 64 KiB to 1 MiB of weights, beside the inputs of those columns.
constexpr int64_t kFewRows = 32, kManyRows = 256, kColumns = 1024;
// Tokens at a time, so that their inputs and sums stay in cache.
constexpr int64_t kMostTokens = 1024;
// Rows that a thread takes at a time in products straight from packed weights.
constexpr int64_t kDotRows = 16, kMostDotRows = 256;
// Tokens up to which products straight from packed weights are faster than AMX tiles.
constexpr int64_t kBeforeTiles = 2;
// Weights that are worth a second thread.
constexpr int64_t kWeightsPerThread = 1 << 16;

// Call work(begin, end) for pieces of rows. Threads take pieces as they get free, which changes no result.
template <class Work>
void for_rows(int64_t rows, int64_t columns, int64_t piece, const Work& work) {
  const int64_t pieces = (rows + piece - 1) / piece;
  const int64_t worth = std::max<int64_t>(1, rows * columns / kWeightsPerThread);
  const int64_t threads = std::min({int64_t(at::get_num_threads()), pieces, worth});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < pieces;) work(i * piece, std::min(rows, (i + 1) * piece));
  });
}

// x [T, I] in another type, with zeros up to the padded width.
Tensor padded_input(const Tensor& x, at::ScalarType type) {
  const int64_t columns = x.size(1), width = msp::padded(columns);
  if (width == columns) return x.to(type).contiguous();
  Tensor out = at::zeros({x.size(0), width}, x.options().dtype(type));
  out.narrow(1, 0, columns).copy_(x);
  return out;
}

// out[t, row] = sums[(row - begin) * stride + t] by the row's scale plus bias[row]; in blocks, because it transposes.
template <class Float>
void write(const float* sums, int64_t stride, const Packed& w, const Tensor* bias, int64_t begin, int64_t end,
           int64_t tokens, Float* out) {
  constexpr int64_t kBlock = 16;
  const Float* add = bias ? bias->const_data_ptr<Float>() : nullptr;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t some = std::min(kBlock, end - first);
    float biases[kBlock] = {};
    for (int64_t i = 0; add && i < some; ++i) biases[i] = static_cast<float>(add[first + i]);
    for (int64_t t = 0; t < tokens; ++t) {
      float values[kBlock] = {};
      for (int64_t i = 0; i < some; ++i) values[i] = sums[(first - begin + i) * stride + t];
      for (int64_t i = 0; w.scales && i < some; ++i) values[i] *= w.scales[first + i];
      if (add)  // else a negative zero stays one
        for (int64_t i = 0; i < kBlock; ++i) values[i] += biases[i];
      Float* to = out + t * w.rows + first;
      if (some == kBlock)
        for (int64_t i = 0; i < kBlock; ++i) to[i] = static_cast<Float>(values[i]);
      else
        for (int64_t i = 0; i < some; ++i) to[i] = static_cast<Float>(values[i]);
    }
  }
}

template <class Float>
void few(const Packed& w, const msp::Kernel& kernel, const Tensor& x, const Tensor* bias, Float* out) {
  const int64_t tokens = x.size(0);
  const Tensor input = padded_input(x, kernel.input16 ? at::kBFloat16 : at::kFloat);
  const char* data = static_cast<const char*>(input.const_data_ptr());
  const int64_t bytes = msp::padded(w.columns) * input.element_size();
  const int64_t piece = std::clamp(w.rows / (8 * at::get_num_threads()) / kDotRows * kDotRows, kDotRows, kMostDotRows);
  for_rows(w.rows, w.columns, piece, [&](int64_t first, int64_t last) {
    float sums[kDotRows * msp::kTokens];
    for (int64_t begin = first; begin < last; begin += kDotRows) {
      const int64_t end = std::min(last, begin + kDotRows);
      for (int64_t t = 0; t < tokens; t += msp::kTokens) {
        const int64_t some = std::min(msp::kTokens, tokens - t);
        kernel.dot(w, data + t * bytes, some, begin, end, sums);
        write(sums, some, w, bias, begin, end, some, out + t * w.rows);
      }
    }
  });
}

// Memory from a cache line's start that a thread keeps between calls: to ask for it anew costs as much as some products.
template <class Number, int tag>
Number* scratch(int64_t count) {
  constexpr std::size_t kLine = 64;
  struct Free {
    void operator()(Number* memory) const { ::operator delete[](memory, std::align_val_t{kLine}); }
  };
  thread_local std::unique_ptr<Number[], Free> memory;
  thread_local int64_t size = 0;
  if (size < count) memory.reset(new (std::align_val_t{kLine}) Number[count]), size = count;
  return memory.get();
}

// x [T, words] to [words, padded_tokens], zeros for the tokens that are not there.
Tensor transposed(const Tensor& x, int64_t padded_tokens) {
  constexpr int64_t kBlock = 16;  // a cache line of words
  const int64_t tokens = x.size(0), words = x.size(1);
  Tensor out = at::empty({words, padded_tokens}, x.options());
  const auto* from = static_cast<const uint32_t*>(x.const_data_ptr());
  auto* to = static_cast<uint32_t*>(out.mutable_data_ptr());
  at::parallel_for(0, words / kBlock, std::max<int64_t>(1, 4096 / tokens), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin * kBlock; block < end * kBlock; block += kBlock) {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = block; i < block + kBlock; ++i) to[i * padded_tokens + t] = from[t * words + i];
      for (int64_t i = block; i < block + kBlock; ++i)
        std::fill(to + i * padded_tokens + tokens, to + (i + 1) * padded_tokens, 0);
    }
  });
  return out;
}

// out [T, O] by tiles: W [rows, columns] x^T [columns, T], summed over the columns in float.
template <class Float, class Weight>
void many(const Packed& w, msp::Unpack unpack, const Tensor& x, const Tensor* bias, Float* out) {
  constexpr bool pairs = sizeof(Weight) == 2;  // 16-bit inputs stand in pairs of columns, as AMX reads them
  const int64_t tokens = x.size(0), width = msp::padded(w.columns);
  // oneDNN makes a kernel for each number of tokens: few numbers, few kernels.
  const int64_t even = tokens > kFewTokens ? (tokens + 63) / 64 * 64 : (tokens + 15) / 16 * 16;
  Tensor input = padded_input(x, c10::CppTypeToScalarType<Weight>::value);
  input = transposed(pairs ? input.view(at::kInt) : input, even);
  const Weight* data = static_cast<const Weight*>(input.const_data_ptr());
  const int64_t tile = tokens > kFewTokens ? kManyRows : kFewRows, step = std::min(kColumns, width);
  for_rows(w.rows, w.columns, tile, [&](int64_t begin, int64_t end) {
    const int64_t rows = end - begin;
    Weight* weights = scratch<Weight, 0>(tile * step);
    float* sums = scratch<float, 1>(tile * even);
    int64_t places[kManyRows];
    for (int64_t row = begin; row < end; ++row) places[row - begin] = w.start(row);
    for (int64_t c = 0; c < width; c += step) {
      const int64_t columns = std::min(step, width - c);
      unpack(w, begin, end, c, c + columns, places, weights, step);
      at::native::cpublas::brgemm(rows, even, columns, step, even, even, c > 0, weights, data + c * even,
                                  sums, pairs);
    }
    at::native::cpublas::brgemm_release(pairs);  // gives AMX's registers back
    write(sums, even, w, bias, begin, end, tokens, out);
  });
}

// x [T, width] to pairs of columns for each tile of `inputs` inputs: [tiles, width / 2, inputs]; zeros for none.
Tensor input_tiles(const Tensor& x, int64_t inputs, int64_t tiles, msp::Arrange arrange) {
  const int64_t tokens = x.size(0), words = x.size(1) / 2;
  Tensor out = at::empty({tiles, words, inputs}, x.options().dtype(at::kInt));
  const auto* from = static_cast<const uint32_t*>(x.const_data_ptr());
  auto* to = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>());
  at::parallel_for(0, tiles, std::max<int64_t>(1, kWeightsPerThread / (words * inputs)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      arrange(from + i * inputs * words, tokens - i * inputs, words, inputs, to + i * inputs * words);
  });
  return out;
}

// Rows that a thread takes at a time, and columns of them that are unpacked at a time, for AMX tiles.
struct Piece {
  int64_t rows, columns;
};

Piece tile_piece(const Packed& w, int64_t tokens) {
  // Few tokens: long pieces, because the first tile of each waits for memory, but enough of them to share out.
  if (tokens <= kFewTokens) return {std::clamp(w.rows / 32 / 16 * 16, kFewRows, kManyRows / 2), 0};
  // Many: columns such that those of two tiles of rows and two of inputs stay in the first cache; more rows where the
  // inputs, which are read once for each piece, do not stay in the second.
  const int64_t width = msp::padded(w.columns), columns = width / std::max<int64_t>(1, width / 256);
  return {tokens * width > 1 << 20 ? kManyRows : kManyRows / 2, (columns + kPiece - 1) / kPiece * kPiece};
}

// out [T, O] on AMX tiles, for bfloat16.
void on_tiles(const Packed& w, const msp::Kernel& kernel, const Tensor& x, const Tensor* bias, at::BFloat16* out) {
  const int64_t tokens = x.size(0), inputs = std::min(tokens, kTileInputs), count = (tokens + inputs - 1) / inputs;
  const Tensor input = input_tiles(padded_input(x, at::kBFloat16), inputs, count, kernel.arrange);
  const auto* data = reinterpret_cast<const uint32_t*>(input.const_data_ptr<int32_t>());
  const auto* add = bias ? reinterpret_cast<const uint16_t*>(bias->const_data_ptr<at::BFloat16>()) : nullptr;
  const Piece piece = tile_piece(w, tokens);
  for_rows(w.rows, w.columns, piece.rows, [&](int64_t begin, int64_t end) {
    uint16_t* weights = scratch<uint16_t, 0>(piece.rows * piece.columns);  // few tokens need none
    float* sums = piece.columns ? scratch<float, 1>(piece.rows * inputs * count) : nullptr;
    kernel.tiles(w, data, tokens, begin, end, piece.columns, weights, sums, add, reinterpret_cast<uint16_t*>(out));
  });
}

template <class Float>
void product(const Packed& w, msp::Type type, msp::Isa isa, const Tensor& x, const Tensor* bias, Tensor& out) {
  const msp::Kernel kernel = msp::kernel(isa, w.scales ? msp::Type::kInt8 : type, type);
  Float* to = out.mutable_data_ptr<Float>();
  if (x.size(0) <= (kernel.tiles ? kBeforeTiles : msp::kTokens)) return few<Float>(w, kernel, x, bias, to);
  const bool amx = kernel.unpack16 && at::native::cpublas::could_pack(c10::CppTypeToScalarType<Float>::value);
  for (int64_t t = 0; t < x.size(0); t += kMostTokens) {
    const Tensor some = x.narrow(0, t, std::min(kMostTokens, x.size(0) - t));
    if constexpr (std::is_same_v<Float, at::BFloat16>)
      if (kernel.tiles) {
        on_tiles(w, kernel, some, bias, to + t * w.rows);
        continue;
      }
    if constexpr (sizeof(Float) == 2)
      if (amx) {
        many<Float, Float>(w, kernel.unpack16, some, bias, to + t * w.rows);
        continue;
      }
    many<Float, float>(w, kernel.unpack, some, bias, to + t * w.rows);
  }
}

msp::Isa isa_named(c10::string_view name) {
  if (name == "amx_bf16") return msp::Isa::kAmxBf16;
  if (name == "avx512_bf16") return msp::Isa::kAvx512Bf16;
  if (name == "avx512") return msp::Isa::kAvx512;
  if (name == "avx2") return msp::Isa::kAvx2;
  TORCH_CHECK(name == "portable", "there is no kernel ", name, "; known: amx_bf16, avx512_bf16, avx512, avx2, portable");
  return msp::Isa::kPortable;
}

bool cpu_supports(c10::string_view kernel) { return msp::supported(isa_named(kernel)); }

Tensor bitmask_linear(const Tensor& x, const Tensor& values, const Tensor& bitmask, const Tensor& row_offsets,
                      const std::optional<Tensor>& scale, const std::optional<Tensor>& bias, int64_t in_features,
                      c10::string_view kernel) {
  const int64_t rows = row_offsets.numel();
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == in_features, "an input of width ", x.dim() ? x.size(-1) : 0,
              " meets a weight with in_features = ", in_features);
  const at::ScalarType type = scale ? at::kChar : x.scalar_type();
  TORCH_CHECK(values.scalar_type() == type && (!bias || bias->scalar_type() == x.scalar_type()),
              "input, values and bias must share a dtype, or values with a scale be int8, found ", x.scalar_type(),
              " and ", values.scalar_type());
  TORCH_CHECK(!scale || (scale->numel() == rows && scale->is_floating_point()), "the scale has ",
              scale ? scale->numel() : 0, " numbers for ", rows, " rows");
  TORCH_CHECK(values.is_contiguous() && bitmask.is_contiguous() && row_offsets.is_contiguous() &&
                  bitmask.scalar_type() == at::kByte && row_offsets.scalar_type() == at::kLong &&
                  bitmask.numel() == rows * ((in_features + 7) / 8) &&
                  (!bias || (bias->is_contiguous() && bias->numel() == rows)),
              "bitmask, row offsets and bias do not belong to a weight [", rows, ", ", in_features, "]");
  const msp::Isa isa = isa_named(kernel);
  TORCH_CHECK(msp::supported(isa), "this CPU does not run the kernel ", kernel);
  auto shape = x.sizes().vec();
  shape.back() = rows;
  Tensor out = at::empty(shape, x.options());
  if (!out.numel()) return out;
  const Tensor scales = scale ? scale->to(at::kFloat).contiguous() : Tensor();
  const Packed w{values.const_data_ptr(), values.numel(), bitmask.const_data_ptr<uint8_t>(),
                 row_offsets.const_data_ptr<int64_t>(), rows, in_features,
                 scale ? scales.const_data_ptr<float>() : nullptr};
  const Tensor flat = x.reshape({-1, in_features});
  const Tensor* add = bias ? &*bias : nullptr;
  if (x.scalar_type() == at::kBFloat16)
    product<at::BFloat16>(w, msp::Type::kBFloat16, isa, flat, add, out);
  else if (x.scalar_type() == at::kHalf)
    product<at::Half>(w, msp::Type::kHalf, isa, flat, add, out);
  else if (x.scalar_type() == at::kFloat)
    product<float>(w, msp::Type::kFloat, isa, flat, add, out);
  else
    TORCH_CHECK(false, "a weight of ", x.scalar_type(), "; the kernels take bfloat16, float16 and float32");
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(msp_plugin, library) {
  library.def(
      "bitmask_linear(Tensor x, Tensor values, Tensor bitmask, Tensor row_offsets, Tensor? scale, Tensor? bias, "
      "int in_features, str kernel) -> Tensor");
  library.def("cpu_supports(str kernel) -> bool", cpu_supports);
}

TORCH_LIBRARY_IMPL(msp_plugin, CPU, library) { library.impl("bitmask_linear", bitmask_linear); }
