// Products of packed bfloat16 weights with two and more inputs on AMX tiles. Included by expand_x86.h.
//
// A piece of columns of some rows is expanded into tiles in cache; each tile of 16 rows by 32 columns is multiplied by
// tiles of 32 columns of up to 16 inputs. A sum runs over the columns in their order,
// whatever the number of inputs. Subnormal numbers count as zero, as AMX takes them.

#define MSP_AMX                                                                                                  \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx2,fma," \
                        "f16c,popcnt")))

namespace amx {

constexpr int64_t kTile = 16;              // rows, and at most inputs, of a tile
constexpr int64_t kWords = kTile * kStep;  // 16-bit weights of a tile

// True if the CPU has AMX for bfloat16 and the system lets this process use it.
inline bool supported() {
#if defined(__linux__)
  static const bool answer = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
    constexpr long kRequest = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return has && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return answer;
#else
  return false;
#endif
}

// Expand columns first to last of `rows` rows, at most kTile, to tiles [steps][kTile][kStep]; places move on.
template <bool safe, int rows>
MSP_AMX inline void expand(const Packed& w, int64_t row, int64_t first, int64_t last, int64_t* places, uint16_t* out) {
  const uint8_t *values = static_cast<const uint8_t*>(w.values), *values_end = values + w.count * 2;
  const uint8_t *masks[rows], *from[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
    masks[r] = w.masks + (row + r) * w.mask_bytes(), from[r] = values + 2 * places[r];
  for (int64_t c = first; c < last; c += kStep, out += kWords)
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const uint32_t bits = mask_bits(masks[r], c, w.columns);
      if constexpr (safe) _mm_prefetch(reinterpret_cast<const char*>(from[r] + (last - first)), _MM_HINT_T0);
      _mm512_storeu_si512(out + r * kStep, Bf16::expand<safe>(from[r], values_end, bits));
      from[r] += 2 * _mm_popcnt_u32(bits);
    }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) places[r] = (from[r] - values) / 2;
}

// Expand columns first to last of rows begin to end to tiles [row tiles][steps][kTile][kStep]; rows beyond are left.
MSP_AMX inline void expand_tiles(const Packed& w, int64_t begin, int64_t end, int64_t first, int64_t last,
                                 int64_t* places, uint16_t* out) {
  for (int64_t row = begin; row < end;) {
    int64_t* place = places + row - begin;
    uint16_t* to = out + (row - begin) / kTile * kTile * (last - first) + (row - begin) % kTile * kStep;
    bool safe = row + kRows <= end && (row - begin) % kTile <= kTile - kRows;  // within a tile
    for (int64_t r = 0; safe && r < kRows; ++r) safe = is_safe(w, place[r]);
    if (safe)
      expand<true, kRows>(w, row, first, last, place, to), row += kRows;
    else
      expand<false, 1>(w, row, first, last, place, to), row += 1;
  }
}

struct alignas(64) TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not say which memory they read: what was written before must be there.
MSP_INLINE void all_written(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Tiles 0 to 3: sums; 4 and 5: weights; 6 and 7: inputs.
MSP_AMX inline void configure(int64_t inputs) {
  TileSizes sizes;
  for (int i = 0; i < 8; ++i) {
    sizes.rows[i] = kTile;
    sizes.row_bytes[i] = i == 4 || i == 5 ? 64 : static_cast<uint16_t>(4 * inputs);
  }
  all_written(&sizes);
  _tile_loadconfig(&sizes);
}

// Add products of two row tiles with one or two input tiles to sums [2 kTile, stride], or store them there.
template <bool two>
MSP_AMX inline void multiply(const uint16_t* weights, const uint32_t* x, int64_t inputs, int64_t words, int64_t steps,
                             bool add, float* sums, int64_t stride) {
  float* low = sums + kTile * stride;
  all_written(weights);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, sums, 4 * stride);
    _tile_loadd(2, low, 4 * stride);
    if constexpr (two) {
      _tile_loadd(1, sums + inputs, 4 * stride);
      _tile_loadd(3, low + inputs, 4 * stride);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    const uint32_t* input = x + s * kTile * inputs;
    _tile_loadd(4, weights + s * kWords, 64);
    _tile_loadd(5, weights + (steps + s) * kWords, 64);
    _tile_loadd(6, input, 4 * inputs);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (two) {
      _tile_loadd(7, input + words * inputs, 4 * inputs);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 4 * stride);
  _tile_stored(2, low, 4 * stride);
  if constexpr (two) {
    _tile_stored(1, sums + inputs, 4 * stride);
    _tile_stored(3, low + inputs, 4 * stride);
  }
}

MSP_AMX inline void tiles(const Packed& w, const uint32_t* x, int64_t inputs, int64_t input_tiles, int64_t begin,
                          int64_t end, int64_t columns, int64_t* places, uint16_t* weights, float* sums) {
  const int64_t width = padded(w.columns), words = width / 2, stride = inputs * input_tiles;
  for (int64_t row = begin; row < end; ++row) places[row - begin] = w.start(row);
  configure(inputs);
  for (int64_t c = 0; c < width; c += columns) {
    const int64_t last = c + columns < width ? c + columns : width, steps = (last - c) / kStep;
    expand_tiles(w, begin, end, c, last, places, weights);
    for (int64_t i = 0; i < input_tiles; i += 2)
      for (int64_t r = 0; r < end - begin; r += 2 * kTile) {
        const uint16_t* rows = weights + r * (last - c);
        const uint32_t* input = x + (i * words + c / 2) * inputs;
        float* to = sums + r * stride + i * inputs;
        if (i + 1 < input_tiles)
          multiply<true>(rows, input, inputs, words, steps, c > 0, to, stride);
        else
          multiply<false>(rows, input, inputs, words, steps, c > 0, to, stride);
      }
  }
  _tile_release();
}

}  // namespace amx
