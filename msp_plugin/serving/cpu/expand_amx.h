// Products of packed weights with bfloat16 inputs on AMX tiles; a Step says how weights are expanded to bfloat16. Included by expand_x86.h.
//
// A piece of columns of some rows is expanded into tiles in cache; each tile of 16 rows by 32 columns is multiplied by
// tiles of 32 columns of up to 16 inputs. A sum runs over the columns in their order, whatever the number of inputs.
// Subnormal numbers count as zero, as AMX takes them. An AMX product costs the same for one input as for 16, and runs
// beside the expansion, where the bfloat16 dot product of AVX-512 takes the port that expands, for each input anew.

#define MSP_AMX                                                                                                  \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma," \
                        "f16c,popcnt")))

namespace amx {

constexpr int64_t kTile = 16;              // rows, and at most inputs, of a tile
static_assert(kTile == kTileInputs);
constexpr int64_t kWords = kTile * kStep;  // 16-bit weights of a tile
constexpr int64_t kSums = kTile * kTile;   // sums, or pairs of inputs, of a tile
constexpr int64_t kFewTiles = 4;           // tiles of inputs whose sums stay in registers
static_assert(kFewTiles * kTile == kFewTokens);

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

// Store the next kStep columns of a row, expanded; returns where the row's values go on.
template <class Step, bool safe>
MSP_AMX MSP_INLINE const uint8_t* expand_step(const uint8_t* from, const uint8_t* end, uint32_t bits, uint16_t* out) {
  _mm512_storeu_si512(out, Step::template expand<safe>(from, end, bits));
  return from + Step::kBytes * _mm_popcnt_u64(bits);
}

// The rows of a tile, up to kTile of them, and where the values of each go on.
template <class Step>
struct RowTile {
  const Packed& w;
  int64_t row, rows;
  const uint8_t* from[kTile];
  int64_t ahead = 0;  // bytes to about the same place in the next tile that this thread takes
  bool safe;          // no load of a row leaves the values, and there are kTile rows

  RowTile(const Packed& w, int64_t row, int64_t end) : w(w), row(row), rows(end - row < kTile ? end - row : kTile) {
    safe = rows == kTile;
    if (row + kTile < end) ahead = Step::kBytes * (w.start(row + kTile) - w.start(row));
    for (int64_t r = 0; r < rows; ++r) {
      from[r] = static_cast<const uint8_t*>(w.values) + Step::kBytes * w.start(row + r);
      safe = safe && is_safe(w, w.start(row + r));
    }
  }

  // Expand columns first to last to [steps][kTile][kStep]; rows that are not there are left as they were.
  MSP_AMX MSP_INLINE void expand(int64_t first, int64_t last, uint16_t* out) {
    for (int64_t c = first; c < last; c += kPiece, out += kPiece * kTile)
      if (safe && c + kPiece <= w.columns)
        expand_piece(c, out);
      else
        expand_rest(c, c + kPiece < last ? c + kPiece : last, out);
  }

  // Expand kPiece columns of a safe tile, four rows at a time: their chains of masks and places overlap.
  MSP_AMX MSP_INLINE void expand_piece(int64_t column, uint16_t* out) {
    const int64_t stride = w.mask_bytes();
    const uint8_t *masks = w.masks + row * stride + column / 8, *at[kRows];
    for (int64_t r = 0; r < kTile; r += kRows, masks += kRows * stride, out += kRows * kStep) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        at[i] = from[r + i];
        _mm_prefetch(reinterpret_cast<const char*>(at[i]) + ahead, _MM_HINT_T1);
      }
#pragma GCC unroll 4
      for (int s = 0; s < kPiece / kStep; ++s)
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          uint32_t bits;
          std::memcpy(&bits, masks + i * stride + s * kStep / 8, 4);
          at[i] = expand_step<Step, true>(at[i], nullptr, bits, out + s * kWords + i * kStep);
        }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) from[r + i] = at[i];
    }
  }

  // The same of fewer columns, of the last ones, or of rows near the end of the values: row by row.
  MSP_AMX void expand_rest(int64_t first, int64_t last, uint16_t* out) {
    const uint8_t* end = static_cast<const uint8_t*>(w.values) + Step::kBytes * w.count;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = first; c < last; c += kStep) {
        const uint32_t bits = mask_bits(w.masks + (row + r) * w.mask_bytes(), c, w.columns);
        from[r] = expand_step<Step, false>(from[r], end, bits, out + (c - first) * kTile + r * kStep);
      }
  }
};

struct alignas(64) TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not say which memory they read: no store may move from one side of this to the other.
MSP_INLINE void in_order(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// Tiles 0 to 3: sums; 4 and 5: weights; 6 and 7: inputs.
MSP_AMX inline void configure(int64_t inputs) {
  TileSizes sizes;
  for (int i = 0; i < 8; ++i) {
    sizes.rows[i] = kTile;
    sizes.row_bytes[i] = i == 4 || i == 5 ? 64 : static_cast<uint16_t>(4 * inputs);
  }
  in_order(&sizes);
  _tile_loadconfig(&sizes);
}

// sums [tiles, kTile, inputs] = a row tile times `tiles` input tiles. While a piece of columns is multiplied, the next
// one is expanded to other memory, so that neither waits for the other.
template <int tiles, class Step>
MSP_AMX inline void multiply_row_tile(RowTile<Step> rows, const uint32_t* x, int64_t inputs, float* sums) {
  alignas(64) uint16_t weights[2][kTile * kPiece];
  const int64_t width = padded(rows.w.columns), next = width / 2 * inputs;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = -kPiece; c < width; c += kPiece) {
    const int64_t last = c + kPiece < width ? c + kPiece : width;
    if (last < width)
      rows.expand(last, last + kPiece < width ? last + kPiece : width, weights[last / kPiece % 2]);
    in_order(weights);
    for (int64_t at = c < 0 ? last : c; at < last; at += kStep) {
      const uint32_t* input = x + at / 2 * inputs;
      _tile_loadd(4, weights[c / kPiece % 2] + (at - c) * kTile, 64);
      _tile_loadd(6, input, 4 * inputs);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (tiles > 1) {
        _tile_loadd(7, input + next, 4 * inputs);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (tiles > 2) {
        _tile_loadd(6, input + 2 * next, 4 * inputs);
        _tile_dpbf16ps(2, 4, 6);
      }
      if constexpr (tiles > 3) {
        _tile_loadd(7, input + 3 * next, 4 * inputs);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    in_order(weights);
  }
  _tile_stored(0, sums, 4 * inputs);
  if constexpr (tiles > 1) _tile_stored(1, sums + kTile * inputs, 4 * inputs);
  if constexpr (tiles > 2) _tile_stored(2, sums + 2 * kTile * inputs, 4 * inputs);
  if constexpr (tiles > 3) _tile_stored(3, sums + 3 * kTile * inputs, 4 * inputs);
}

// Add products of two row tiles with one or two tiles of kTile inputs to sums, or store them there. x_next: words to
// the second input tile; sums: the first row tile's, [two ? 2 : 1, kTile, kTile], the second row tile's `below` later.
template <bool two>
MSP_AMX inline void multiply(const uint16_t* weights, const uint32_t* x, int64_t x_next, int64_t steps, bool add,
                             float* sums, int64_t below) {
  float* low = sums + below;
  in_order(weights);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(2, low, 64);
    if constexpr (two) {
      _tile_loadd(1, sums + kSums, 64);
      _tile_loadd(3, low + kSums, 64);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    const uint32_t* input = x + s * kSums;
    _tile_loadd(4, weights + s * kWords, 64);
    _tile_loadd(5, weights + (steps + s) * kWords, 64);
    _tile_loadd(6, input, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (two) {
      _tile_loadd(7, input + x_next, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, low, 64);
  if constexpr (two) {
    _tile_stored(1, sums + kSums, 64);
    _tile_stored(3, low + kSums, 64);
  }
  in_order(weights);
}

// Transpose 16 vectors of 16 numbers: pairs, fours and eights of them change places.
MSP_AMX MSP_INLINE void transpose(__m512* rows) {
  __m512 next[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i += 2) {
    next[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    next[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    const int low = i / 4 * 4 + i % 4 / 2;
    const __m512d a = _mm512_castps_pd(next[low]), b = _mm512_castps_pd(next[low + 2]);
    rows[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    const int low = i / 8 * 8 + i % 4;
    next[i] = i % 8 < 4 ? _mm512_shuffle_f32x4(rows[low], rows[low + 4], 0x88)
                        : _mm512_shuffle_f32x4(rows[low], rows[low + 4], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTile; ++i) {
    const int low = i % 8;
    rows[i] = i < 8 ? _mm512_shuffle_f32x4(next[low], next[low + 8], 0x88)
                    : _mm512_shuffle_f32x4(next[low], next[low + 8], 0xdd);
  }
}

// Pairs of columns of a tile of inputs, [words, inputs], from x [tokens, words]; zeros for tokens that are not there.
MSP_AMX inline void arrange(const uint32_t* x, int64_t tokens, int64_t words, int64_t inputs, uint32_t* out) {
  const __mmask16 here = static_cast<__mmask16>((1 << inputs) - 1);
  for (int64_t word = 0; word < words; word += kTile) {
    __m512 values[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t)
      values[t] = t < tokens ? _mm512_loadu_ps(x + t * words + word) : _mm512_setzero_ps();
    transpose(values);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) _mm512_mask_storeu_ps(out + (word + i) * inputs, here, values[i]);
  }
}

// out[t * stride + r] = sums [kTile, inputs] [r, t] times unit and scales[r] plus bias[r] (none of the arrays if null), for
// the rows and tokens that are there.
MSP_AMX inline void write(const float* sums, int64_t inputs, int64_t tokens, int64_t rows, float unit,
                          const float* scales, const uint16_t* bias, uint16_t* out, int64_t stride) {
  const __mmask16 here = static_cast<__mmask16>((1 << inputs) - 1), kept = static_cast<__mmask16>((1 << rows) - 1);
  __m512 add = _mm512_setzero_ps(), values[kTile];
  if (bias)
    add = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, bias)), 16));
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) values[r] = _mm512_maskz_loadu_ps(here, sums + r * inputs);
  transpose(values);
  const __m512 times = scales ? _mm512_maskz_loadu_ps(kept, scales) : _mm512_set1_ps(1);
  for (int64_t t = 0; t < tokens; ++t) {
    const __m512 value = _mm512_mul_ps(_mm512_mul_ps(values[t], _mm512_set1_ps(unit)), times);
    const __m512 sum = bias ? _mm512_add_ps(value, add) : value;  // without one a negative zero stays one
    _mm256_mask_storeu_epi16(out + t * stride, kept, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
  }
}

// The outputs of a row tile and input tile `tile`.
template <class Step>
MSP_AMX inline void write(const RowTile<Step>& rows, const float* sums, int64_t inputs, int64_t tile, int64_t tokens,
                          const uint16_t* bias, uint16_t* out) {
  const int64_t first = tile * kTile, here = tokens - first < inputs ? tokens - first : inputs;
  write(sums, inputs, here, rows.rows, Step::kUnit, rows.w.scales ? rows.w.scales + rows.row : nullptr,
        bias ? bias + rows.row : nullptr, out + first * rows.w.rows + rows.row, rows.w.rows);
}

// Products of up to kFewTiles input tiles: row tile by row tile, in registers over all columns.
template <class Step>
MSP_AMX inline void few_tiles(const Packed& w, const uint32_t* x, int64_t tokens, int64_t begin, int64_t end,
                              const uint16_t* bias, uint16_t* out) {
  const int64_t inputs = tokens < kTile ? tokens : kTile, tiles = (tokens + inputs - 1) / inputs;
  alignas(64) float sums[kFewTiles * kSums];
  for (int64_t row = begin; row < end; row += kTile) {
    const RowTile<Step> rows(w, row, end);
    switch (tiles) {
      case 1: multiply_row_tile<1>(rows, x, inputs, sums); break;
      case 2: multiply_row_tile<2>(rows, x, inputs, sums); break;
      case 3: multiply_row_tile<3>(rows, x, inputs, sums); break;
      default: multiply_row_tile<4>(rows, x, inputs, sums);
    }
    for (int64_t i = 0; i < tiles; ++i) write(rows, sums + i * kTile * inputs, inputs, i, tokens, bias, out);
  }
}

// Products of more input tiles: pieces of columns of all rows, expanded once for all inputs.
template <class Step>
MSP_AMX inline void many_tiles(const Packed& w, const uint32_t* x, int64_t tokens, int64_t begin, int64_t end,
                               int64_t columns, uint16_t* weights, float* sums, const uint16_t* bias, uint16_t* out) {
  const int64_t width = padded(w.columns), words = width / 2 * kTile, tiles = (tokens + kTile - 1) / kTile;
  std::vector<RowTile<Step>> rows;
  for (int64_t row = begin; row < end; row += kTile) rows.emplace_back(w, row, end);
  for (int64_t c = 0; c < width; c += columns) {
    const int64_t last = c + columns < width ? c + columns : width, steps = (last - c) / kStep;
    for (std::size_t r = 0; r < rows.size(); ++r) rows[r].expand(c, last, weights + r * steps * kWords);
    for (int64_t i = 0; i < tiles; i += 2) {
      const int64_t some = tiles - i < 2 ? 1 : 2;
      for (std::size_t r = 0; r < rows.size(); r += 2) {
        const uint16_t* from = weights + r * steps * kWords;
        const uint32_t* input = x + i * words + c / 2 * kTile;
        float* to = sums + (r * tiles + i) * kSums;
        if (some == 2)
          multiply<true>(from, input, words, steps, c > 0, to, tiles * kSums);
        else
          multiply<false>(from, input, words, steps, c > 0, to, tiles * kSums);
      }
      for (int64_t at = i; last == width && at < i + some; ++at)  // while the sums are in cache
        for (std::size_t r = 0; r < rows.size(); ++r)
          write(rows[r], sums + (r * tiles + at) * kSums, kTile, at, tokens, bias, out);
    }
  }
}

template <class Step>
MSP_AMX inline void tiles(const Packed& w, const uint32_t* x, int64_t tokens, int64_t begin, int64_t end,
                          int64_t columns, uint16_t* weights, float* sums, const uint16_t* bias, uint16_t* out) {
  configure(tokens < kTile ? tokens : kTile);
  if (tokens <= kFewTiles * kTile)
    few_tiles<Step>(w, x, tokens, begin, end, bias, out);
  else
    many_tiles<Step>(w, x, tokens, begin, end, columns, weights, sums, bias, out);
  _tile_release();
}

}  // namespace amx
