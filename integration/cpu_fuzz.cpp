// Hostile packed weights for expand.h under AddressSanitizer: random shapes, masks, offsets and counts, every kernel.
// Each array is a block of its own of exactly its size, so that any read beyond it ends the program. Products and
// unpacked tiles are compared with the portable form, bit for bit in what is unpacked.
//
//     cpu_fuzz SECONDS SEED
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "expand.h"

using msp::Isa, msp::Packed, msp::Type;

namespace {

std::mt19937_64 random_bits;

int64_t below(int64_t bound) { return int64_t(random_bits() % uint64_t(bound)); }

int64_t hostile_offset(int64_t count) {
  switch (below(8)) {
    case 0: return -1 - below(1000);
    case 1: return count + below(3);
    case 2: return INT64_MIN + below(2);
    case 3: return INT64_MAX - below(2);
    default: return below(count + 1);
  }
}

struct Case {
  std::unique_ptr<uint8_t[]> values, masks;
  std::unique_ptr<int64_t[]> offsets;
  std::unique_ptr<float[]> scales;
  Packed packed;
};

Case make(Type type) {
  const int64_t bytes = type == Type::kFloat ? 4 : type == Type::kInt8 ? 1 : 2, rows = 1 + below(below(8) ? 12 : 80), columns = 1 + below(300);
  const int64_t count = below(4) ? below(rows * columns + 1) : below(70), width = (columns + 7) / 8;
  Case c;
  c.values.reset(new uint8_t[count * bytes]);
  for (int64_t i = 0; i < count; ++i) {
    // small whole numbers, exact in every type and sum
    const float value = float(below(9) - 4);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint16_t word = uint16_t(bits >> 16);
    if (type == Type::kHalf)
      word = value == 0 ? 0 : uint16_t((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
    const int8_t byte = int8_t(value);
    const void* from = type == Type::kFloat ? (void*)&bits : type == Type::kInt8 ? (void*)&byte : (void*)&word;
    std::memcpy(c.values.get() + i * bytes, from, bytes);
  }
  c.masks.reset(new uint8_t[rows * width]);
  const bool full = below(3) == 0;
  for (int64_t i = 0; i < rows * width; ++i) c.masks[i] = full ? 255 : uint8_t(random_bits());
  c.offsets.reset(new int64_t[rows]);
  for (int64_t i = 0; i < rows; ++i) c.offsets[i] = hostile_offset(count);
  if (type == Type::kInt8) {
    c.scales.reset(new float[rows]);
    for (int64_t i = 0; i < rows; ++i) c.scales[i] = float(1 << below(3));
  }
  c.packed = {c.values.get(), count, c.masks.get(), c.offsets.get(), rows, columns, c.scales.get()};
  return c;
}

template <class Number>
std::unique_ptr<Number[]> block(int64_t count) {
  return std::unique_ptr<Number[]>(new Number[count]());
}

void fail(const char* what, Isa isa, Type type, const Packed& w) {
  std::printf("%s differs: isa %d type %d rows %ld columns %ld count %ld\n", what, int(isa), int(type), long(w.rows),
              long(w.columns), long(w.count));
  std::exit(1);
}

void check(Isa isa, Type type, Type input, const Packed& w) {
  const msp::Kernel kernel = msp::kernel(isa, type, input), plain = msp::kernel(Isa::kPortable, type, input);
  const int64_t width = msp::padded(w.columns), tokens = 1 + below(msp::kTokens), rows = w.rows;
  const int64_t begin = below(rows), end = begin + 1 + below(rows - begin), some = end - begin;
  auto ones = block<float>(tokens * width);
  auto ones16 = block<uint16_t>(tokens * width);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < w.columns; ++i) ones[t * width + i] = 1, ones16[t * width + i] = 0x3f80;
  auto expected = block<float>(some * tokens), sums = block<float>(some * tokens);
  plain.dot(w, ones.get(), tokens, begin, end, expected.get());
  kernel.dot(w, kernel.input16 ? (void*)ones16.get() : (void*)ones.get(), tokens, begin, end, sums.get());
  if (std::memcmp(expected.get(), sums.get(), some * tokens * 4)) fail("product", isa, type, w);

  auto places = block<int64_t>(some), places16 = block<int64_t>(some), wanted = block<int64_t>(some);
  for (int64_t r = 0; r < some; ++r) places[r] = places16[r] = wanted[r] = w.start(begin + r);
  auto tile = block<float>(some * width), right = block<float>(some * width);
  auto tile16 = block<uint16_t>(some * width);
  for (int64_t first = 0; first < width; first += 64) {
    const int64_t last = std::min(first + 64, width);
    plain.unpack(w, begin, end, first, last, wanted.get(), right.get() + first, width);
    kernel.unpack(w, begin, end, first, last, places.get(), tile.get() + first, width);
    if (kernel.unpack16) kernel.unpack16(w, begin, end, first, last, places16.get(), tile16.get() + first, width);
  }
  if (std::memcmp(tile.get(), right.get(), some * width * 4)) fail("tile", isa, type, w);
  for (int64_t i = 0; kernel.unpack16 && i < some * width; ++i) {
    const float value = input == Type::kHalf ? msp::half_to_float(tile16[i]) : msp::as_float(uint32_t(tile16[i]) << 16);
    if (value != right[i]) fail("16-bit tile", isa, type, w);
  }
}

uint16_t rounded(float value) {  // to bfloat16, to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Products on AMX tiles with ones, and a bias, in arrays of exactly the size that they may use.
void check_tiles(Isa isa, Type type, Type input, const Packed& w) {
  const msp::Kernel kernel = msp::kernel(isa, type, input);
  if (!kernel.tiles) return;
  const int64_t begin = below(w.rows), end = begin + 1 + below(w.rows - begin), room = (end - begin + 31) / 32 * 32;
  const int64_t tokens = 1 + below(below(2) ? 16 : 150), inputs = std::min<int64_t>(tokens, 16), count = (tokens + inputs - 1) / inputs;
  const int64_t words = msp::padded(w.columns) / 2, columns = 64 * (1 + below(5));
  auto ones = block<float>(2 * words), expected = block<float>(end - begin);
  auto ones16 = block<uint16_t>(tokens * 2 * words);
  for (int64_t c = 0; c < w.columns; ++c) {
    ones[c] = 1;
    for (int64_t t = 0; t < tokens; ++t) ones16[t * 2 * words + c] = 0x3f80;
  }
  auto pairs = block<uint32_t>(count * words * inputs);
  for (int64_t i = 0; i < count; ++i) {
    const auto* from = reinterpret_cast<const uint32_t*>(ones16.get()) + i * inputs * words;
    kernel.arrange(from, tokens - i * inputs, words, inputs, pairs.get() + i * inputs * words);
  }
  msp::kernel(Isa::kPortable, type, input).dot(w, ones.get(), 1, begin, end, expected.get());
  const bool many = tokens > 64, biased = below(2);
  auto weights = block<uint16_t>(many ? room * columns : 0);
  auto sums = block<float>(many ? room * inputs * count : 0);
  auto bias = block<uint16_t>(w.rows), out = block<uint16_t>(tokens * w.rows);
  for (int64_t row = 0; row < w.rows; ++row) bias[row] = rounded(float(below(9) - 4));
  kernel.tiles(w, pairs.get(), tokens, begin, end, columns, weights.get(), sums.get(), biased ? bias.get() : nullptr, out.get());
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t row = 0; row < w.rows; ++row) {
      const bool here = row >= begin && row < end;
      const float add = biased ? msp::as_float(uint32_t(bias[row]) << 16) : 0;
      if (out[t * w.rows + row] != (here ? rounded(expected[row - begin] * (w.scales ? w.scales[row] : 1) + add) : 0)) fail("product on tiles", isa, type, w);
    }
}

}  // namespace

int main(int, char** arguments) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
  random_bits.seed(std::strtoull(arguments[2], nullptr, 10));
  long cases = 0;
  for (; std::chrono::steady_clock::now() < until; ++cases) {
    const Type type = static_cast<Type>(below(4)), input = type == Type::kInt8 ? static_cast<Type>(below(3)) : type;
    const Case c = make(type);
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16})
      if (msp::supported(isa)) check(isa, type, input, c.packed), check_tiles(isa, type, input, c.packed);
  }
  std::printf("%ld cases, no read out of bounds, all kernels agree\n", cases);
}
