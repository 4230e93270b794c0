// Rows of packed codes against activations of 16 or 8 bits, for processors with AVX2; see rounded.h.
#include "rounded.h"

#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>

#include "avx2_codes.h"

constexpr int64_t kChunk = 16;             // rows whose scales are decoded together

static int kind_of(const Packed& w) {
  if (w.mantissa_bits == 0) return w.bits;
  if (w.bits == 4 && w.mantissa_bits == 1 && w.exponent_bias == 1) return kFloat4;
  if (w.bits == 6 && w.mantissa_bits == 3 && w.exponent_bias == 1) return kFloat6;
  return 0;
}
static float unit_of(int kind) { return kind == kFloat4 ? 0.5f : kind == kFloat6 ? 0.125f : 1.0f; }
static float offset_of(const Packed& w, int kind) {  // what codes, as integers of no sign, are above values
  if (w.zero) return 1.0f;
  return kind == kFloat4 ? 12.0f : kind == kFloat6 ? 60.0f : float(1 << (w.bits - 1));
}

bool can_round(const Packed& w) {
  return cpu() >= Cpu::avx2 && kind_of(w) != 0 && (w.num_blocks == 1 || w.block % 32 == 0);
}

// ---- products ------------------------------------------------------------------------------------

// Sums of products of 64 elements: four of the first block, four of the second.
template <int KIND> AVX2 __m256i product(const Bytes& v, const int16_t* x) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i* xs = (const __m256i*)x;
  const __m256i a = _mm256_madd_epi16(_mm256_unpacklo_epi8(v.first, none), _mm256_loadu_si256(xs));
  const __m256i b = _mm256_madd_epi16(_mm256_unpackhi_epi8(v.first, none), _mm256_loadu_si256(xs + 1));
  const __m256i c = _mm256_madd_epi16(_mm256_unpacklo_epi8(v.second, none), _mm256_loadu_si256(xs + 2));
  const __m256i d = _mm256_madd_epi16(_mm256_unpackhi_epi8(v.second, none), _mm256_loadu_si256(xs + 3));
  return _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
}
template <int KIND> AVX2 __m256i product(const Bytes& v, const int8_t* x) {
  const __m256i* xs = (const __m256i*)x;
  const __m256i a = _mm256_maddubs_epi16(v.first, _mm256_loadu_si256(xs));
  const __m256i b = _mm256_maddubs_epi16(v.second, _mm256_loadu_si256(xs + 1)), one = _mm256_set1_epi16(1);
  if constexpr (KIND == kFloat6)  // up to 120: the two together would leave 16 bits
    return _mm256_add_epi32(_mm256_madd_epi16(a, one), _mm256_madd_epi16(b, one));
  return _mm256_madd_epi16(_mm256_add_epi16(a, b), one);
}

struct Scales {  // of up to kChunk rows, [rows, stride], zero-padded
  std::vector<float> scale, shift;  // shift: scale times zero point
  const float* shifts;              // what zero_sums are multiplied by
};

AVX2 void decode_scales(const Packed& w, int64_t n, int64_t count, int64_t stride, float* flat, Scales& to) {
  Packed run = w;  // the rows' scales lie one behind the other: decoded as those of one long row
  run.num_blocks = count * w.num_blocks;
  run.scale += n * w.num_blocks * (w.scale_kind == ScaleKind::bf16 ? 2 : 1);
  block_scales(run, 0, flat);
  const int64_t times = w.num_blocks == 1 ? (w.num_columns + 31) / 32 : w.block / 32;
  for (int64_t r = 0; r < count; r++) {
    const float* from = flat + r * w.num_blocks;
    float* scale = to.scale.data() + r * stride;
    if (times == 1) std::memcpy(scale, from, w.num_blocks * sizeof(float));
    else
      for (int64_t b = 0, at = 0; b < w.num_blocks; b++)
        for (int64_t j = 0; j < times && at < stride; j++) scale[at++] = from[b];
    if (!w.zero) continue;
    const uint8_t* zero = w.zero + (n + r) * w.num_blocks;
    float* shift = to.shift.data() + r * stride;
    for (int64_t b = 0, at = 0; b < w.num_blocks; b++)
      for (int64_t j = 0; j < times && at < stride; j++) shift[at++] = from[b] * float(zero[b]);
  }
}

template <typename T> AVX2 const T* integers(const Rounded& x) {
  if constexpr (sizeof(T) == 2) return x.wide.data();
  else return x.narrow.data();
}

// NR rows of the weight against MT rows of activations.
template <int KIND, typename T, int NR, int MT>
TARGET void tile(const Packed& w, const Rounded& x, int64_t m, const Scales& scales, int64_t r, int64_t n, float* y, int64_t ldy) {
  const int64_t num_supers = x.columns / kSuper, whole = std::min(w.padded() / kSuper, num_supers);
  const T* xs = integers<T>(x) + m * x.columns;
  const float *ratios = x.ratios.data() + m * num_supers * 8, *scale = scales.scale.data() + r * x.stride;
  const uint8_t* row = w.codes + n * w.row_bytes;
  const __m256i apart = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  __m256 acc[NR][MT];
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < MT; j++) acc[i][j] = _mm256_setzero_ps();
  auto step = [&](int i, const uint8_t* from, int64_t padded, int64_t at, int64_t s) TARGET __attribute__((always_inline)) {
    Bytes v = codes_of<KIND>(from, padded, at);
    v = {values_of<KIND>(v.first), values_of<KIND>(v.second)};
    const __m256d pair = _mm256_broadcast_sd((const double*)(scale + i * x.stride + 2 * s));
    const __m256 factor = _mm256_permutevar_ps(_mm256_castpd_ps(pair), apart);
#pragma GCC unroll 2
    for (int j = 0; j < MT; j++) {
      const __m256 sums = _mm256_cvtepi32_ps(product<KIND>(v, xs + j * x.columns + kSuper * s));
      const __m256 ratio = _mm256_loadu_ps(ratios + (j * num_supers + s) * 8);
      acc[i][j] = _mm256_fmadd_ps(sums, _mm256_mul_ps(factor, ratio), acc[i][j]);
    }
  };
  for (int64_t s = 0; s < whole; s++)
#pragma GCC unroll 4
    for (int i = 0; i < NR; i++) step(i, row + i * w.row_bytes, w.padded(), s, s);
  if (whole < num_supers) {  // of 4 or 8 bits, whose rows may end within a super
    const int64_t start = kSuper * whole * w.bits / 8;
    for (int i = 0; i < NR; i++) {
      alignas(32) uint8_t copy[64] = {0};
      std::memcpy(copy, row + i * w.row_bytes + start, w.row_bytes - start);
      step(i, copy, kSuper, 0, whole);
    }
  }
  const float *sums = x.zero_sums.data() + m * x.stride, *shift = scales.shifts + r * x.stride;
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++)
#pragma GCC unroll 2
    for (int j = 0; j < MT; j++) {
      __m256 total = acc[i][j];
      for (int64_t b = 0; b < x.stride; b += 8)
        total = _mm256_fnmadd_ps(_mm256_loadu_ps(shift + i * x.stride + b), _mm256_loadu_ps(sums + j * x.stride + b), total);
      __m128 half = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
      half = _mm_add_ps(half, _mm_movehl_ps(half, half));
      y[(m + j) * ldy + n + i] = x.top[m + j] * _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
}

template <int KIND, typename T, int NR>
TARGET void all_rows(const Packed& w, const Rounded& x, const Scales& scales, int64_t r, int64_t n, float* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + 2 <= x.num_rows; m += 2) tile<KIND, T, NR, 2>(w, x, m, scales, r, n, y, ldy);
  if (m < x.num_rows) tile<KIND, T, NR, 1>(w, x, m, scales, r, n, y, ldy);
}

template <int KIND, typename T>
TARGET void run(const Packed& w, const Rounded& x, float* y, int64_t ldy, int64_t n0, int64_t n1) {
  Scales scales{std::vector<float>(kChunk * x.stride), std::vector<float>(w.zero ? kChunk * x.stride : 0), nullptr};
  scales.shifts = w.zero ? scales.shift.data() : scales.scale.data();
  std::vector<float> flat(kChunk * w.num_blocks);
  for (int64_t n = n0; n < n1; n += kChunk) {
    const int64_t count = std::min(kChunk, n1 - n);
    decode_scales(w, n, count, x.stride, flat.data(), scales);
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) all_rows<KIND, T, 4>(w, x, scales, r, n + r, y, ldy);
    for (; r < count; r++) all_rows<KIND, T, 1>(w, x, scales, r, n + r, y, ldy);
  }
}

void rounded_rows(const Packed& w, const Rounded& x, float* y, int64_t ldy, int64_t n0, int64_t n1) {
  switch (kind_of(w) + (x.narrow.empty() ? 0 : 100)) {
#define KIND(K) \
  case K: return run<K, int16_t>(w, x, y, ldy, n0, n1);
#define BOTH(K) KIND(K) case 100 + K: return run<K, int8_t>(w, x, y, ldy, n0, n1);
    BOTH(2) BOTH(3) BOTH(4) BOTH(5) BOTH(6) KIND(8) BOTH(kFloat4) BOTH(kFloat6)
#undef BOTH
#undef KIND
  }
}

// ---- activations ---------------------------------------------------------------------------------

// 32 values, zeros behind `left`: the largest magnitude as bits.
AVX2 int32_t load_block(const float* x, int64_t left, __m256* v) {
  alignas(32) float copy[32] = {0};
  if (left < 32) std::memcpy(copy, x, left * sizeof(float));
  const float* from = left < 32 ? copy : x;
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_loadu_ps(from + 8 * i);
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x7fffffff)));
  }
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// Integers of a block into their super's order; their sum.
TARGET static int32_t store_block(const __m256* v, float inverse, bool second, int16_t* wide, int8_t* narrow) {
  __m256i q[4], sum = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], _mm256_set1_ps(inverse)));
    sum = _mm256_add_epi32(sum, q[i]);
  }
  const __m256i low = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
  const __m256i high = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[2], q[3]), 0xd8);
  if (wide) {
    __m128i* to = (__m128i*)wide + second;
    _mm_storeu_si128(to, _mm256_castsi256_si128(low)), _mm_storeu_si128(to + 2, _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(to + 4, _mm256_castsi256_si128(high)), _mm_storeu_si128(to + 6, _mm256_extracti128_si256(high, 1));
  } else {
    const __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
    __m128i* to = (__m128i*)narrow + second;
    _mm_storeu_si128(to, _mm256_castsi256_si128(all)), _mm_storeu_si128(to + 2, _mm256_extracti128_si256(all, 1));
  }
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

TARGET bool round_activations(const float* x, int64_t num_rows, const Packed& w, int bits, Rounded& to) {
  const int kind = kind_of(w);
  const int64_t K = w.num_columns, num_supers = supers(K), num_blocks = 2 * num_supers;
  const float most = bits == 8 ? 127.0f : 32767.0f, offset = offset_of(w, kind), unit = unit_of(kind);
  const bool narrow = bits == 8 && kind != 8;
  to.num_rows = num_rows, to.columns = num_supers * kSuper, to.stride = (num_blocks + 7) / 8 * 8;
  if (narrow) to.narrow.resize(num_rows * to.columns);
  else to.wide.resize(num_rows * to.columns);
  to.ratios.resize(num_rows * num_supers * 8);
  to.zero_sums.resize(num_rows * to.stride);
  to.top.resize(num_rows);
  for (int64_t m = 0; m < num_rows; m++) {
    float *ratios = to.ratios.data() + m * num_supers * 8, *sums = to.zero_sums.data() + m * to.stride, top = 0;
    for (int64_t b = 0; b < num_blocks; b++) {
      __m256 v[4];
      const int32_t largest = load_block(x + m * K + 32 * b, std::clamp<int64_t>(K - 32 * b, 0, 32), v);
      if (largest >= 0x7f800000) return false;
      const float scale = as_float(uint32_t(largest)) / most, inverse = scale >= 0x1p-120f ? 1.0f / scale : 0.0f;
      const int64_t at = m * to.columns + b / 2 * kSuper;
      const int32_t sum = store_block(v, inverse, b & 1, narrow ? nullptr : to.wide.data() + at,
                                      narrow ? to.narrow.data() + at : nullptr);
      sums[b] = float(sum) * offset;
      ratios[4 * b] = scale;
      top = std::max(top, scale);
    }
    const float inverse = top >= 0x1p-120f ? 1.0f / top : 0.0f;
    for (int64_t b = 0; b < num_blocks; b++) {
      const float ratio = ratios[4 * b] * inverse;
      sums[b] *= ratio;
      for (int i = 0; i < 4; i++) ratios[4 * b + i] = ratio;
    }
    to.top[m] = top * unit;
  }
  return true;
}

#else
bool can_round(const Packed&) { return false; }
bool round_activations(const float*, int64_t, const Packed&, int, Rounded&) { return false; }
void rounded_rows(const Packed&, const Rounded&, float*, int64_t, int64_t, int64_t) {}
#endif
