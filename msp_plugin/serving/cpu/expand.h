// Products with packed weights on a CPU: kept values, expanded by a bitmask in registers. Knows nothing of torch.
//
// A weight [rows, columns] is its kept values row by row, a bitmask of ceil(columns / 8) bytes a row, lowest bit
// first, and for each row the place of its first value (compressed-tensors' sparse-bitmask; sparse-24-bitmask is
// the same with rows of equal length). Zeros are expanded and multiplied, so that a zero times an infinity is NaN,
// as in a dense product.
//
// Values are of the inputs' type, or whole numbers of 8 bits with a scale for each row. Those are expanded and summed as
// the numbers that they are, exact in every type, and a row's sum is multiplied by its scale.
//
// No read leaves the arrays, whatever offsets and masks say: an offset outside the values counts as their end, bits
// beyond the last column are cleared, and where a row's bits could lead beyond the last value (only rows near the
// end of the values), loads are masked by the values that are left.
//
// Every output is summed in an order that depends on columns alone, so results do not depend on how rows are shared
// out or grouped.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace msp {

enum class Type { kBFloat16, kHalf, kFloat, kInt8 };
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

struct Packed {
  const void* values;
  int64_t count;  // of values
  const uint8_t* masks;
  const int64_t* offsets;  // [rows]
  int64_t rows;
  int64_t columns;
  const float* scales = nullptr;  // [rows], for values of 8 bits

  int64_t mask_bytes() const { return (columns + 7) / 8; }
  int64_t start(int64_t row) const {
    const int64_t offset = offsets[row];
    return offset < 0 || offset > count ? count : offset;
  }
};

// Inputs are padded with zeros to a multiple of this many columns.
constexpr int64_t kStep = 32;
// The most inputs that one pass over the packed weights serves.
constexpr int64_t kTokens = 4;
// Inputs of an AMX tile.
constexpr int64_t kTileInputs = 16;
// Up to this many tokens, AMX tiles are multiplied straight from expanded weights; above it, from scratch memory.
constexpr int64_t kFewTokens = 4 * kTileInputs;
// Columns of AMX tiles that are expanded at a time are a multiple of this.
constexpr int64_t kPiece = 2 * kStep;

inline int64_t padded(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }

// out[(row - begin) * tokens + t] = the product of a row with input t, for rows begin to end; tokens is 1 to kTokens.
// x: [tokens, padded(columns)], bfloat16 if Kernel.input16, else float.
using Dot = void (*)(const Packed&, const void* x, int64_t tokens, int64_t begin, int64_t end, float* out);

// out[(row - begin) * stride + c - first] = weight, for rows begin to end and columns first to last, zero beyond the
// last column; first and last are multiples of kStep. places[row - begin]: the place of the next value; it moves on.
using Unpack = void (*)(const Packed&, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t* places,
                        void* out, int64_t stride);

// out [words, inputs] = pairs of columns of `inputs` inputs, at most kTileInputs, from x [tokens, words]; zeros for
// tokens that are not there. words is a multiple of 16.
using Arrange = void (*)(const uint32_t* x, int64_t tokens, int64_t words, int64_t inputs, uint32_t* out);

// out[t * rows of the weight + row] = the product of a row with input t by its scale, plus its bias (none if null),
// bfloat16, for rows begin to end. x: each tile of min(tokens, kTileInputs) inputs as Arrange leaves it, [tiles, padded(columns) / 2,
// inputs]. Above kFewTokens `columns`, a multiple of kPiece, are unpacked at a time, and weights [rows, columns] and
// sums [rows, tokens] are scratch, with room up to the next multiple of 32 rows and kTileInputs tokens; else they are
// not used.
using Tiles = void (*)(const Packed&, const uint32_t* x, int64_t tokens, int64_t begin, int64_t end, int64_t columns,
                       uint16_t* weights, float* sums, const uint16_t* bias, uint16_t* out);

struct Kernel {
  Dot dot;
  Unpack unpack;         // to float
  Unpack unpack16;       // to the inputs' 16-bit type; null where the instruction set has no fast way
  Arrange arrange;       // null but for AMX, like tiles
  Tiles tiles;
  bool input16;
};

// Bits of the columns from `column` on, up to 32, in a row's mask; zero beyond the last column.
inline uint32_t mask_bits(const uint8_t* mask, int64_t column, int64_t columns) {
  if (columns - column >= 32) {
    uint32_t bits;
    std::memcpy(&bits, mask + column / 8, 4);
    return bits;
  }
  uint32_t bits = 0;
  for (int64_t c = column, shift = 0; c < columns; c += 8, shift += 8) bits |= uint32_t(mask[c / 8]) << shift;
  return columns <= column ? 0 : bits & ((uint32_t(1) << (columns - column)) - 1);
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // infinity, NaN
  // 2**112 moves the exponent's bias from 15 to 127, and makes subnormal numbers normal.
  const float value = as_float(magnitude << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return as_float(sign | bits);
}

template <Type type>
inline float load_one(const void* values, int64_t place) {
  if constexpr (type == Type::kInt8) return static_cast<const int8_t*>(values)[place];
  if constexpr (type == Type::kFloat) return static_cast<const float*>(values)[place];
  const uint16_t bits = static_cast<const uint16_t*>(values)[place];
  if constexpr (type == Type::kHalf) return half_to_float(bits);
  return as_float(uint32_t(bits) << 16);
}

// ---- portable ----

// Expand up to 32 columns to floats; returns the place after them.
template <Type type>
inline int64_t expand_portable(const Packed& w, uint32_t bits, int64_t place, float* out) {
  for (int64_t c = 0; c < kStep; ++c) {
    const bool kept = bits >> c & 1;
    out[c] = kept && place < w.count ? load_one<type>(w.values, place) : 0.0f;
    place += kept;
  }
  return place;
}

template <Type type>
void dot_portable(const Packed& w, const void* x, int64_t tokens, int64_t begin, int64_t end, float* out) {
  const float* input = static_cast<const float*>(x);
  const int64_t width = padded(w.columns);
  constexpr int64_t kLanes = 16;
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* mask = w.masks + row * w.mask_bytes();
    int64_t place = w.start(row);
    float sums[kTokens][kLanes] = {};
    for (int64_t c = 0; c < w.columns; c += kStep) {
      float weights[kStep];
      place = expand_portable<type>(w, mask_bits(mask, c, w.columns), place, weights);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < kStep; ++i) sums[t][i % kLanes] += weights[i] * input[t * width + c + i];
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0;
      for (int64_t i = 0; i < kLanes; ++i) sum += sums[t][i];
      out[(row - begin) * tokens + t] = sum;
    }
  }
}

template <Type type>
void unpack_portable(const Packed& w, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t* places,
                     void* out, int64_t stride) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* mask = w.masks + row * w.mask_bytes();
    float* to = static_cast<float*>(out) + (row - begin) * stride;
    int64_t place = places[row - begin];
    for (int64_t c = first; c < last; c += kStep)
      place = expand_portable<type>(w, mask_bits(mask, c, w.columns), place, to + c - first);
    places[row - begin] = place;
  }
}

}  // namespace msp

#if defined(__x86_64__)
#include "expand_x86.h"
#endif

namespace msp {

inline bool supported(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  return x86::supported(isa);
#else
  return false;
#endif
}

// The functions for values of a type and an instruction set, which must be supported.
template <Type type>
Kernel kernel(Isa isa, Type input) {
#if defined(__x86_64__)
  if (isa != Isa::kPortable) return x86::kernel<type>(isa, input);
#endif
  return {dot_portable<type>, unpack_portable<type>, nullptr, nullptr, nullptr, false};
}

// The same for values and inputs of types; only values of 8 bits differ from their inputs.
inline Kernel kernel(Isa isa, Type values, Type input) {
  switch (values) {
    case Type::kInt8: return kernel<Type::kInt8>(isa, input);
    case Type::kFloat: return kernel<Type::kFloat>(isa, input);
    case Type::kHalf: return kernel<Type::kHalf>(isa, input);
    default: return kernel<Type::kBFloat16>(isa, input);
  }
}

}  // namespace msp
