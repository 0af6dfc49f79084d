// The x86 forms of expand.h. Each function names the instructions that it needs; none runs unless supported() says so.
#pragma once

#include <immintrin.h>
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MSP_INLINE inline __attribute__((always_inline))
#define MSP_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define MSP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,popcnt")))
#define MSP_BF16                                                                                                   \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt")))

namespace msp::x86 {

constexpr int64_t kRows = 4;  // rows at a time: their chains of loads and sums overlap

namespace amx {
bool supported();
}

inline bool supported(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::kAvx2) return avx2;
  if (!avx512 || isa == Isa::kAvx512) return avx512;
  const bool bf16 = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                    __builtin_cpu_supports("avx512bf16");
  return bf16 && (isa == Isa::kAvx512Bf16 || amx::supported());
}

// True if no mask of the row can lead a load of `lanes` values beyond the last value.
inline bool is_safe(const Packed& w, int64_t place) { return place <= w.count - padded(w.columns) - 64; }

// How many values of `bytes` each are left from `from` on, at most `most`.
MSP_INLINE int64_t left(const uint8_t* from, const uint8_t* end, int64_t bytes, int64_t most) {
  return from >= end ? 0 : (end - from) / bytes < most ? (end - from) / bytes : most;
}

// Bits `from` to `from + lanes` of 32, lowest first.
template <int lanes>
MSP_INLINE uint32_t kept_bits(uint32_t bits, int from) {
  if constexpr (lanes == 32)
    return bits;
  else
    return bits >> from & ((uint32_t(1) << lanes) - 1);
}

// For each byte of a mask: which of the next values each of eight columns takes; 0x80 for none.
struct Targets {
  alignas(64) uint8_t lane[256][8];
  alignas(64) uint8_t bytes[256][16];
  constexpr Targets() : lane(), bytes() {
    for (int mask = 0; mask < 256; ++mask) {
      uint8_t next = 0;
      for (int c = 0; c < 8; ++c) {
        const bool kept = mask >> c & 1;
        lane[mask][c] = kept ? next : 0x80;
        bytes[mask][2 * c] = kept ? 2 * next : 0x80;
        bytes[mask][2 * c + 1] = kept ? 2 * next + 1 : 0x80;
        next += kept;
      }
    }
  }
};
inline constexpr Targets kTargets;

constexpr int bytes_of(Type type) { return type == Type::kFloat ? 4 : type == Type::kInt8 ? 1 : 2; }

// Which byte of a vector each top byte of 16 numbers of 32 bits takes: from `first` on, `step` apart.
template <int first, int step>
struct Tops {
  alignas(64) uint32_t byte[16];
  constexpr Tops() : byte() {
    for (int i = 0; i < 16; ++i) byte[i] = uint32_t(first + step * i) << 24;
  }
};
template <int first, int step>
inline constexpr Tops<first, step> kTops;

// ---- a step of each instruction set: kLanes columns, expanded in a register, multiplied and added ----

template <Type type>
struct Avx2 {
  static constexpr int kLanes = 8, kBytes = bytes_of(type);
  using Input = float;
  using Output = float;
  using Sum = __m256;

  template <bool safe>
  MSP_AVX2 static MSP_INLINE __m256 expand(const uint8_t* from, const uint8_t* end, uint32_t bits) {
    alignas(32) uint8_t rest[kLanes * kBytes] = {};
    if constexpr (!safe) {
      const int64_t some = left(from, end, kBytes, kLanes);
      if (some) std::memcpy(rest, from, some * kBytes);
      from = rest;
    }
    if constexpr (type == Type::kFloat) {
      const __m256i lanes =
          _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTargets.lane[bits])));
      const __m256 kept = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
      return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31)),
                              _mm256_permutevar8x32_ps(kept, lanes));
    } else if constexpr (type == Type::kInt8) {
      const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTargets.lane[bits]));
      const __m128i kept = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(kept, lanes)));
    } else {
      const __m128i moved =
          _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)),
                           _mm_load_si128(reinterpret_cast<const __m128i*>(kTargets.bytes[bits])));
      if constexpr (type == Type::kHalf) return _mm256_cvtph_ps(moved);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(moved), 16));
    }
  }
  MSP_AVX2 static MSP_INLINE __m256 zero() { return _mm256_setzero_ps(); }
  MSP_AVX2 static MSP_INLINE __m256 add(__m256 sum, __m256 weights, const float* x) {
    return _mm256_fmadd_ps(weights, _mm256_loadu_ps(x), sum);
  }
  MSP_AVX2 static MSP_INLINE void store(float* out, __m256 weights) { _mm256_storeu_ps(out, weights); }
  MSP_AVX2 static MSP_INLINE float total(__m256 sum) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

template <Type type>
struct Avx512 {
  static constexpr int kLanes = 16, kBytes = bytes_of(type);
  using Input = float;
  using Output = float;
  using Sum = __m512;

  template <bool safe>
  MSP_AVX512 static MSP_INLINE __m512 expand(const uint8_t* from, const uint8_t* end, uint32_t bits) {
    const int64_t some = safe ? kLanes : left(from, end, kBytes, kLanes);
    const __mmask16 here = static_cast<__mmask16>((uint32_t(1) << some) - 1);
    __m512 kept;
    if constexpr (type == Type::kFloat) {
      kept = safe ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(here, from);
      asm("" : "+v"(kept));
    } else if constexpr (type == Type::kInt8) {
      const __m128i raw = safe ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                               : _mm_maskz_loadu_epi8(here, from);
      return _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), _mm512_cvtepi8_epi32(raw)));
    } else {
      const __m256i raw = safe ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                               : _mm256_maskz_loadu_epi16(here, from);
      kept = type == Type::kHalf ? _mm512_cvtph_ps(raw)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), kept);
  }
  MSP_AVX512 static MSP_INLINE __m512 zero() { return _mm512_setzero_ps(); }
  MSP_AVX512 static MSP_INLINE __m512 add(__m512 sum, __m512 weights, const float* x) {
    return _mm512_fmadd_ps(weights, _mm512_loadu_ps(x), sum);
  }
  MSP_AVX512 static MSP_INLINE void store(float* out, __m512 weights) { _mm512_storeu_ps(out, weights); }
  MSP_AVX512 static MSP_INLINE float total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
};

// bfloat16 weights and inputs; also unpacks any type of 16 bits.
struct Bf16 {
  static constexpr int kLanes = 32, kBytes = 2;
  static constexpr float kUnit = 1;
  using Input = uint16_t;
  using Output = uint16_t;
  using Sum = __m512;

  template <bool safe>
  MSP_BF16 static MSP_INLINE __m512i expand(const uint8_t* from, const uint8_t* end, uint32_t bits) {
    const int64_t some = safe ? kLanes : left(from, end, kBytes, kLanes);
    const __mmask32 here = static_cast<__mmask32>((uint64_t(1) << some) - 1);
    __m512i kept = safe ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(here, from);
    asm("" : "+v"(kept));  // in a register: vpexpandw from memory was slower
    return _mm512_maskz_expand_epi16(bits, kept);
  }
  MSP_BF16 static MSP_INLINE __m512 zero() { return _mm512_setzero_ps(); }
  MSP_BF16 static MSP_INLINE __m512 add(__m512 sum, __m512i weights, const uint16_t* x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights),
                            reinterpret_cast<__m512bh>(_mm512_loadu_si512(x)));
  }
  MSP_BF16 static MSP_INLINE void store(uint16_t* out, __m512i weights) { _mm512_storeu_si512(out, weights); }
  MSP_BF16 static MSP_INLINE float total(__m512 sum) { return _mm512_reduce_add_ps(sum); }
};

// The same in float32, the two columns of a pair one after the other: on CPUs with AMX the bfloat16 dot product is slower
// than two in float32, and takes the port that expands.
struct Bf16InFloat : Bf16 {
  MSP_BF16 static MSP_INLINE __m512 add(__m512 sum, __m512i weights, const uint16_t* x) {
    const __m512i inputs = _mm512_loadu_si512(x);
    return _mm512_fmadd_ps(odd(weights), odd(inputs), _mm512_fmadd_ps(even(weights), even(inputs), sum));
  }
  MSP_BF16 static MSP_INLINE __m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  MSP_BF16 static MSP_INLINE __m512 odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000)));
  }
};

// Whole numbers of 8 bits, in float32. They stand in the top byte of 32 bits, so as 2**24 times what they are: a byte takes
// one move to its place, and none for its sign. Sums are divided by that, exactly; products from 2**96 on may overflow.
struct Int8 {
  static constexpr int kLanes = 32, kBytes = 1;
  static constexpr float kUnit = 0x1p-24f;
  using Input = float;
  using Output = float;
  using Sum = __m512;
  struct Weights {
    __m512 low, high;
  };

  template <bool safe>
  MSP_BF16 static MSP_INLINE __m512i expand_bytes(const uint8_t* from, const uint8_t* end, uint32_t bits) {
    const int64_t some = safe ? kLanes : left(from, end, kBytes, kLanes);
    const __mmask32 here = static_cast<__mmask32>((uint64_t(1) << some) - 1);
    __m256i kept =
        safe ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_maskz_loadu_epi8(here, from);
    asm("" : "+v"(kept));
    return _mm512_castsi256_si512(_mm256_maskz_expand_epi8(bits, kept));
  }
  // 16 bytes, from `first` on and `step` apart, each at the top of 32 bits.
  template <int first, int step>
  MSP_BF16 static MSP_INLINE __m512i tops(__m512i bytes) {
    return _mm512_maskz_permutexvar_epi8(0x8888888888888888, _mm512_load_si512(kTops<first, step>.byte), bytes);
  }
  template <bool safe>
  MSP_BF16 static MSP_INLINE Weights expand(const uint8_t* from, const uint8_t* end, uint32_t bits) {
    const __m512i bytes = expand_bytes<safe>(from, end, bits);
    return {_mm512_cvtepi32_ps(tops<0, 1>(bytes)), _mm512_cvtepi32_ps(tops<16, 1>(bytes))};
  }
  MSP_BF16 static MSP_INLINE __m512 zero() { return _mm512_setzero_ps(); }
  MSP_BF16 static MSP_INLINE __m512 add(__m512 sum, const Weights& weights, const float* x) {
    return _mm512_fmadd_ps(weights.high, _mm512_loadu_ps(x + 16), _mm512_fmadd_ps(weights.low, _mm512_loadu_ps(x), sum));
  }
  MSP_BF16 static MSP_INLINE void store(float* out, const Weights& weights) {
    _mm512_storeu_ps(out, _mm512_mul_ps(weights.low, _mm512_set1_ps(kUnit)));
    _mm512_storeu_ps(out + 16, _mm512_mul_ps(weights.high, _mm512_set1_ps(kUnit)));
  }
  MSP_BF16 static MSP_INLINE float total(__m512 sum) { return _mm512_reduce_add_ps(sum) * kUnit; }
};

// The same expanded to bfloat16, for tiles: as what they are, or in that unit, which takes less.
template <bool in_unit>
struct Int8ToBf16 {
  static constexpr int kLanes = 32, kBytes = 1;
  static constexpr float kUnit = in_unit ? Int8::kUnit : 1;
  using Output = uint16_t;

  template <int first>
  MSP_BF16 static MSP_INLINE __m512i numbers(__m512i bytes) {
    const __m512i tops = Int8::tops<first, 2>(bytes);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(in_unit ? tops : _mm512_srai_epi32(tops, 24)));
  }
  template <bool safe>
  MSP_BF16 static MSP_INLINE __m512i expand(const uint8_t* from, const uint8_t* end, uint32_t bits) {
    const __m512i bytes = Int8::expand_bytes<safe>(from, end, bits);
    // Even columns in the lower halves, odd ones in the upper; the lower 16 bits of these floats are zero.
    return _mm512_or_si512(_mm512_srli_epi32(numbers<0>(bytes), 16), numbers<1>(bytes));
  }
  MSP_BF16 static MSP_INLINE void store(uint16_t* out, __m512i weights) { _mm512_storeu_si512(out, weights); }
};

namespace avx2 {
#define MSP_TARGET MSP_AVX2
#include "expand_rows.h"
#undef MSP_TARGET
}  // namespace avx2

namespace avx512 {
#define MSP_TARGET MSP_AVX512
#include "expand_rows.h"
#undef MSP_TARGET
}  // namespace avx512

namespace bf16 {
#define MSP_TARGET MSP_BF16
#include "expand_rows.h"
#undef MSP_TARGET
}  // namespace bf16

#include "expand_amx.h"

template <Type type>
Kernel kernel(Isa isa, Type input) {
  if (isa == Isa::kAvx2) return {avx2::dot<Avx2<type>>, avx2::unpack<Avx2<type>>, nullptr, nullptr, nullptr, false};
  Kernel kernel{avx512::dot<Avx512<type>>, avx512::unpack<Avx512<type>>, nullptr, nullptr, nullptr, false};
  if (isa == Isa::kAvx512) return kernel;
  if constexpr (type == Type::kInt8) {
    kernel.dot = bf16::dot<Int8>, kernel.unpack = bf16::unpack<Int8>;
    if (input == Type::kBFloat16) kernel.unpack16 = bf16::unpack<Int8ToBf16<false>>;
    if (input == Type::kBFloat16 && isa == Isa::kAmxBf16)
      kernel.arrange = amx::arrange, kernel.tiles = amx::tiles<Int8ToBf16<true>>;
    return kernel;
  }
  if (type != Type::kFloat) kernel.unpack16 = bf16::unpack<Bf16>;
  if (type == Type::kBFloat16) kernel.dot = bf16::dot<Bf16>, kernel.input16 = true;
  if (type == Type::kBFloat16 && isa == Isa::kAmxBf16)
    kernel.dot = bf16::dot<Bf16InFloat>, kernel.arrange = amx::arrange, kernel.tiles = amx::tiles<Bf16>;
  return kernel;
}

}  // namespace msp::x86
