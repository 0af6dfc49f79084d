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
  Packed packed;
};

Case make(Type type) {
  const int64_t bytes = type == Type::kFloat ? 4 : 2, rows = 1 + below(12), columns = 1 + below(300);
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
    std::memcpy(c.values.get() + i * bytes, type == Type::kFloat ? (void*)&bits : (void*)&word, bytes);
  }
  c.masks.reset(new uint8_t[rows * width]);
  const bool full = below(3) == 0;
  for (int64_t i = 0; i < rows * width; ++i) c.masks[i] = full ? 255 : uint8_t(random_bits());
  c.offsets.reset(new int64_t[rows]);
  for (int64_t i = 0; i < rows; ++i) c.offsets[i] = hostile_offset(count);
  c.packed = {c.values.get(), count, c.masks.get(), c.offsets.get(), rows, columns};
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

void check(Isa isa, Type type, const Packed& w) {
  const msp::Kernel kernel = msp::kernel(isa, type), plain = msp::kernel(Isa::kPortable, type);
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
    const float value = type == Type::kHalf ? msp::half_to_float(tile16[i]) : msp::as_float(uint32_t(tile16[i]) << 16);
    if (value != right[i]) fail("16-bit tile", isa, type, w);
  }
}

}  // namespace

int main(int, char** arguments) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(arguments[1]));
  random_bits.seed(std::strtoull(arguments[2], nullptr, 10));
  long cases = 0;
  for (; std::chrono::steady_clock::now() < until; ++cases) {
    const Type type = static_cast<Type>(below(3));
    const Case c = make(type);
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16})
      if (msp::supported(isa)) check(isa, type, c.packed);
  }
  std::printf("%ld cases, no read out of bounds, all kernels agree\n", cases);
}
