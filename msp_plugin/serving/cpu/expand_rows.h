// Products and unpacking of rows by the steps of one instruction set. expand_x86.h includes this file once for each,
// inside a namespace of its own and with MSP_TARGET set: a template takes no target from its arguments.

// Products of `rows` rows from `row` on with `tokens` inputs. `safe`: no load can lead beyond the values (is_safe).
template <class Step, bool safe, int rows, int tokens>
MSP_TARGET void dot_rows(const Packed& w, const typename Step::Input* x, int64_t row, float* out) {
  const int64_t width = padded(w.columns), whole = w.columns / kStep * kStep;
  const uint8_t *values = static_cast<const uint8_t*>(w.values), *values_end = values + w.count * Step::kBytes;
  const uint8_t *masks = w.masks + row * w.mask_bytes(), *from[rows];
  int64_t stride = w.mask_bytes(), end = whole, ahead[rows];  // ahead: bytes to the same place in the next rows
  uint32_t tails[rows];  // the masks of the last columns
  typename Step::Sum sums[rows][tokens];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    const int64_t next = row + r + rows < w.rows ? w.start(row + r + rows) : w.count;
    from[r] = values + w.start(row + r) * Step::kBytes;
    ahead[r] = (next - w.start(row + r)) * Step::kBytes;
    tails[r] = mask_bits(masks + r * stride, whole, w.columns);
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sums[r][t] = Step::zero();
  }
  for (int64_t c = 0;;) {
    for (; c < end; c += kStep, masks += kStep / 8) {
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        uint32_t bits;
        std::memcpy(&bits, masks + r * stride, 4);
        if constexpr (safe) _mm_prefetch(reinterpret_cast<const char*>(from[r] + ahead[r]), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < kStep; i += Step::kLanes) {
          const uint32_t part = kept_bits<Step::kLanes>(bits, i);
          const auto weights = Step::template expand<safe>(from[r], values_end, part);
          from[r] += _mm_popcnt_u64(part) * Step::kBytes;
#pragma GCC unroll 4
          for (int t = 0; t < tokens; ++t) sums[r][t] = Step::add(sums[r][t], weights, x + t * width + c + i);
        }
      }
    }
    if (c == width) break;
    masks = reinterpret_cast<const uint8_t*>(tails), stride = 4, end = width;
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) out[r * tokens + t] = Step::total(sums[r][t]);
}

template <class Step, int tokens>
MSP_TARGET void dot_tokens(const Packed& w, const typename Step::Input* x, int64_t begin, int64_t end, float* out) {
  for (int64_t row = begin; row < end;) {
    bool safe = true;
    for (int64_t r = row; r < row + kRows && r < end; ++r) safe = safe && is_safe(w, w.start(r));
    float* to = out + (row - begin) * tokens;
    if (safe && row + kRows <= end) {
      dot_rows<Step, true, kRows, tokens>(w, x, row, to);
      row += kRows;
    } else {
      dot_rows<Step, false, 1, tokens>(w, x, row, to);
      row += 1;
    }
  }
}

template <class Step>
void dot(const Packed& w, const void* x, int64_t tokens, int64_t begin, int64_t end, float* out) {
  const auto* input = static_cast<const typename Step::Input*>(x);
  switch (tokens) {
    case 1: return dot_tokens<Step, 1>(w, input, begin, end, out);
    case 2: return dot_tokens<Step, 2>(w, input, begin, end, out);
    case 3: return dot_tokens<Step, 3>(w, input, begin, end, out);
    default: return dot_tokens<Step, 4>(w, input, begin, end, out);
  }
}

template <class Step, bool safe>
MSP_TARGET int64_t unpack_row(const Packed& w, int64_t row, int64_t first, int64_t last, int64_t place,
                              typename Step::Output* out) {
  const uint8_t *values = static_cast<const uint8_t*>(w.values), *values_end = values + w.count * Step::kBytes;
  const uint8_t *mask = w.masks + row * w.mask_bytes(), *from = values + place * Step::kBytes;
  for (int64_t c = first; c < last; c += kStep, out += kStep) {
    const uint32_t bits = mask_bits(mask, c, w.columns);
#pragma GCC unroll 4
    for (int i = 0; i < kStep; i += Step::kLanes) {
      const uint32_t part = kept_bits<Step::kLanes>(bits, i);
      Step::store(out + i, Step::template expand<safe>(from, values_end, part));
      from += _mm_popcnt_u64(part) * Step::kBytes;
    }
  }
  return (from - values) / Step::kBytes;
}

template <class Step>
MSP_TARGET void unpack(const Packed& w, int64_t begin, int64_t end, int64_t first, int64_t last, int64_t* places,
                       void* out, int64_t stride) {
  for (int64_t row = begin; row < end; ++row) {
    auto* to = static_cast<typename Step::Output*>(out) + (row - begin) * stride;
    int64_t& place = places[row - begin];
    place = is_safe(w, place) ? unpack_row<Step, true>(w, row, first, last, place, to)
                              : unpack_row<Step, false>(w, row, first, last, place, to);
  }
}
