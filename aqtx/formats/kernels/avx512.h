// Row kernels for processors with AVX-512 BF16.
#pragma once
#include "avx512_four.h"

// (low x 8, high x 8) of two floats next to each other, or two apart.
AVX512 __m512 halves(const float* p, int apart) {
  const __m512i index = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, apart, apart, apart, apart, apart, apart, apart, apart);
  return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}

// One super of one weight row against MT activation rows.
template <int MT, int STEP>
AVX512 void accumulate(const Pair& v, const uint16_t* x, int64_t columns, const float* scales, __m512* acc) {
  const __m512 scale0 = halves(scales, STEP == 16 ? 2 : 1);
  const __m512 scale1 = STEP == 16 ? halves(scales + 1, 2) : scale0;
#pragma GCC unroll 8
  for (int m = 0; m < MT; m++) {
    const __m512bh x0 = (__m512bh)_mm512_loadu_si512(x + m * columns);
    const __m512bh x1 = (__m512bh)_mm512_loadu_si512(x + m * columns + 32);
    __m512 p = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)v.first, x0);
    if constexpr (STEP == 16) {
      acc[m] = _mm512_fmadd_ps(p, scale0, acc[m]);
      p = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)v.second, x1);
      acc[m] = _mm512_fmadd_ps(p, scale1, acc[m]);
    } else {
      p = _mm512_dpbf16_ps(p, (__m512bh)v.second, x1);
      acc[m] = _mm512_fmadd_ps(p, scale0, acc[m]);
    }
  }
}

// What a tile works on: NR weight rows from row n on, their scales one after the other, MT rows of x and y.
struct Tile {
  const uint16_t* x;
  int64_t columns;
  float* y;
  int64_t ldy, n;
  const float* scales;
  int64_t scales_per_row;
};

// Elements that a weight row is read by, and how far ahead: into L2, which keeps the activations in L1.
template <int KIND> constexpr int64_t kSpan = KIND == 4 ? kWide : kSuper;
constexpr int64_t kAhead = 8192, kRowsAhead = 16;

template <int KIND, int STEP, int MT>
AVX512 void step(const Packed& w, const Decoder<KIND>& d, const uint8_t* row, int64_t s, bool cut, const Tile& t,
                 const float* scales, __m512* acc) {
  const uint16_t* x = t.x + kSpan<KIND> * s;
  if constexpr (KIND == 4)
    accumulate_four<MT, STEP>(d, words_of_four(row, s, cut ? w.row_bytes : kWide / 2 * (s + 1)), x, t.columns, scales, acc);
  else
    accumulate<MT, STEP>(cut ? decode_tail(d, row, w, s) : decode(d, row, w.padded(), s), x, t.columns, scales, acc);
}

template <int KIND, int STEP, int MT, int NR>
TARGET void run_tile(const Packed& w, const Decoder<KIND>& d, const Tile& t) {
  constexpr int64_t kSpanBytes = (KIND == 80 ? 8 : KIND) * kSpan<KIND> / 8, kPerSpan = kSpan<KIND> / STEP;
  const int64_t num_spans = (w.num_columns + kSpan<KIND> - 1) / kSpan<KIND>, row_bytes = w.row_bytes;
  const int64_t whole = std::min(w.padded() / kSpan<KIND>, num_spans);
  const uint8_t* row = w.codes + t.n * row_bytes;
  __m512 acc[NR][MT];
#pragma GCC unroll 2
  for (int r = 0; r < NR; r++)
#pragma GCC unroll 8
    for (int m = 0; m < MT; m++) acc[r][m] = _mm512_setzero_ps();
  for (int64_t s = 0; s < whole; s++)
#pragma GCC unroll 2
    for (int r = 0; r < NR; r++) {
      _mm_prefetch((const char*)row + r * row_bytes + kSpanBytes * s + kAhead, _MM_HINT_T1);
      step<KIND, STEP, MT>(w, d, row + r * row_bytes, s, false, t, t.scales + r * t.scales_per_row + kPerSpan * s, acc[r]);
    }
  for (int64_t s = whole; s < num_spans; s++)
#pragma GCC unroll 2
    for (int r = 0; r < NR; r++)
      step<KIND, STEP, MT>(w, d, row + r * row_bytes, s, true, t, t.scales + r * t.scales_per_row + kPerSpan * s, acc[r]);
#pragma GCC unroll 2
  for (int r = 0; r < NR; r++)
#pragma GCC unroll 8
    for (int m = 0; m < MT; m++) t.y[m * t.ldy + t.n + r] = _mm512_reduce_add_ps(acc[r][m]);
}

template <int KIND, int STEP, int NR> TARGET void all_activations(const Packed& w, const Decoder<KIND>& d, Tile t, int64_t left) {
  while (left > 0) {
    const int64_t now = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (now == 8) run_tile<KIND, STEP, 8, NR>(w, d, t);
    else if (now == 4) run_tile<KIND, STEP, 4, NR>(w, d, t);
    else if (now == 2) run_tile<KIND, STEP, 2, NR>(w, d, t);
    else run_tile<KIND, STEP, 1, NR>(w, d, t);
    t.x += now * t.columns, t.y += now * t.ldy, left -= now;
  }
}

template <int KIND, int STEP>
TARGET void rows_stepped(const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t n0, int64_t n1) {
  const Decoder<KIND> d(w);
  const int64_t per_row = scales_per_row(w), stored_bytes = w.num_blocks * (w.scale_kind == ScaleKind::bf16 ? 2 : 1);
  std::vector<float> scales(2 * per_row + kSlack);
  for (int64_t n = n0; n < n1; n += 2) {
    const bool both = n + 2 <= n1;
    for (int64_t at = 0; at < 2 * stored_bytes; at += 64)  // of the rows to come
      _mm_prefetch((const char*)w.scale + (n + kRowsAhead) * stored_bytes + at, _MM_HINT_T0);
    row_scales(w, n, scales.data());
    if (both) row_scales(w, n + 1, scales.data() + per_row);
    const Tile t{x.bf16, x.columns, y, ldy, n, scales.data(), per_row};
    if (both) all_activations<KIND, STEP, 2>(w, d, t, x.num_rows);
    else all_activations<KIND, STEP, 1>(w, d, t, x.num_rows);
  }
}

template <int KIND>
void rows_avx512(const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t n0, int64_t n1) {
  if constexpr (KIND == 4)  // only NVFP4 has blocks of 16
    if (scale_step(w) == 16) return rows_stepped<KIND, 16>(w, x, y, ldy, n0, n1);
  rows_stepped<KIND, 32>(w, x, y, ldy, n0, n1);
}

template <int KIND>
TARGET void dequantize_avx512(
    const Packed& w, uint16_t* out, int64_t n0, int64_t n1) {
  const Decoder<KIND> d(w);
  const int64_t num_supers = supers(w.num_columns), whole = w.padded() / kSuper, step = scale_step(w);
  std::vector<float> scales(scales_per_row(w) + kSlack);
  alignas(64) uint16_t last[kSuper];
  for (int64_t n = n0; n < n1; n++) {
    const uint8_t* row = w.codes + n * w.row_bytes;
    row_scales(w, n, scales.data());
    for (int64_t s = 0; s < num_supers; s++) {
      Pair v = s < whole ? decode(d, row, w.padded(), s) : decode_tail(d, row, w, s);
      const __m256i parts[4] = {_mm512_castsi512_si256(v.first), _mm512_castsi512_si256(v.second),
                                _mm512_extracti64x4_epi64(v.first, 1), _mm512_extracti64x4_epi64(v.second, 1)};
      __m512 f[4];
      for (int i = 0; i < 4; i++) {
        const int64_t k = kSuper * s + 16 * i;
        f[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(parts[i]), 16));
        if (w.zero && k < w.num_columns)
          f[i] = _mm512_sub_ps(f[i], _mm512_set1_ps(float(w.zero[n * w.num_blocks + k / w.block])));
        f[i] = _mm512_mul_ps(f[i], _mm512_set1_ps(scales[k / step]));
      }
      uint16_t* to = out + (n - n0) * w.num_columns + kSuper * s;
      const int64_t left = w.num_columns - kSuper * s;
      uint16_t* target = left >= kSuper ? to : last;
      _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(f[1], f[0]));
      _mm512_storeu_si512(target + 32, (__m512i)_mm512_cvtne2ps_pbh(f[3], f[2]));
      if (left < kSuper) std::memcpy(to, last, left * sizeof(uint16_t));
    }
  }
}
