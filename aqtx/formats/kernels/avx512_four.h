// Four-bit codes against few rows of activations, for processors with AVX-512 BF16.
//
// 64 bytes of codes are 128 elements. Read as 32 words of four codes each, a shift brings one code of every
// word to where the table look-up reads it (it ignores higher bits), so nothing is widened: a load, three
// shifts and four look-ups. Word 8t + i then holds, of elements 32t..32t+31, in turn
//   2i, 16 + 2i, 2i + 1, 17 + 2i
// and each 128-bit lane t belongs to one block of 32, whose scale is applied after the dot products.
#pragma once
#include "avx512_decode.h"

// Activations [M, K] into the order above, zero-padded to `columns`.
TARGET void order_for_four(const uint16_t* from, int64_t num_rows, int64_t num_columns, int64_t columns, uint16_t* to) {
  alignas(64) uint16_t apart[32];  // the four runs of 8 of a block, one after the other
  for (int i = 0; i < 8; i++)
    apart[i] = 2 * i, apart[8 + i] = 16 + 2 * i, apart[16 + i] = 2 * i + 1, apart[24 + i] = 17 + 2 * i;
  const __m512i index = _mm512_load_si512(apart);
  for (int64_t m = 0; m < num_rows; m++)
    for (int64_t k = 0; k < columns; k += kWide) {
      for (int t = 0; t < 4; t++) {
        const int64_t left = std::clamp<int64_t>(num_columns - k - 32 * t, 0, 32);
        const __m512i block = _mm512_maskz_loadu_epi16(uint32_t((1ull << left) - 1), from + m * num_columns + k + 32 * t);
        const __m512i runs = _mm512_permutexvar_epi16(index, block);
        uint16_t* out = to + m * columns + k + 8 * t;
        _mm_storeu_si128((__m128i*)out, _mm512_castsi512_si128(runs));
        _mm_storeu_si128((__m128i*)(out + 32), _mm512_extracti32x4_epi32(runs, 1));
        _mm_storeu_si128((__m128i*)(out + 64), _mm512_extracti32x4_epi32(runs, 2));
        _mm_storeu_si128((__m128i*)(out + 96), _mm512_extracti32x4_epi32(runs, 3));
      }
    }
}

// The s-th 64 bytes of a row that has `row_bytes`; what lies behind them reads as zero.
AVX512 __m512i words_of_four(const uint8_t* row, int64_t s, int64_t row_bytes) {
  const int64_t left = row_bytes - kWide / 2 * s;
  return left >= 64 ? _mm512_loadu_si512(row + 64 * s) : _mm512_maskz_loadu_epi8((1ull << left) - 1, row + 64 * s);
}

// 64 bytes of codes of one weight row against MT activation rows.
template <int MT, int STEP>
AVX512 void accumulate_four(const Decoder<4>& d, __m512i words, const uint16_t* x, int64_t columns, const float* scales,
                            __m512* acc) {
  const __m512bh v0 = (__m512bh)d.look_up(words);
  const __m512bh v1 = (__m512bh)d.look_up(_mm512_srli_epi16(words, 4));
  const __m512bh v2 = (__m512bh)d.look_up(_mm512_srli_epi16(words, 8));
  const __m512bh v3 = (__m512bh)d.look_up(_mm512_srli_epi16(words, 12));
  constexpr int kPer = 32 / STEP;  // scales of a lane
  const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i index = kPer == 1 ? lane : _mm512_add_epi32(lane, lane);
  const __m512 near = _mm512_castps256_ps512(_mm256_loadu_ps(scales));
  const __m512 scale = _mm512_permutexvar_ps(index, near);
  const __m512 second = kPer == 1 ? scale : _mm512_permutexvar_ps(_mm512_add_epi32(index, _mm512_set1_epi32(1)), near);
#pragma GCC unroll 8
  for (int m = 0; m < MT; m++) {
    const __m512bh* xs = (const __m512bh*)(x + m * columns);
    __m512 p = _mm512_dpbf16_ps(_mm512_setzero_ps(), v0, (__m512bh)_mm512_loadu_si512(xs));
    p = _mm512_dpbf16_ps(p, v2, (__m512bh)_mm512_loadu_si512(xs + 2));
    if constexpr (STEP == 16) {
      acc[m] = _mm512_fmadd_ps(p, scale, acc[m]);
      p = _mm512_setzero_ps();
    }
    p = _mm512_dpbf16_ps(p, v1, (__m512bh)_mm512_loadu_si512(xs + 1));
    p = _mm512_dpbf16_ps(p, v3, (__m512bh)_mm512_loadu_si512(xs + 3));
    acc[m] = _mm512_fmadd_ps(p, second, acc[m]);
  }
}
