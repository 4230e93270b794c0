// Decoders of packed codes for processors with AVX-512 BF16.
#pragma once
#include <immintrin.h>
#include <algorithm>
#include <cstring>
#include "packed.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi")))
#define AVX512 TARGET __attribute__((always_inline)) inline

struct Pair { __m512i first, second; };

AVX512 __m512i two(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
AVX512 __m256i widen(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }

// Codes of at most 5 bits index 32 entries, of 6 bits 64; the permutes ignore higher index bits, so a
// table shorter than 32 is repeated instead of the index being masked.
template <int BITS> struct Decoder {
  __m512i t0, t1;
  AVX512 explicit Decoder(const Packed& w) {
    const uint16_t* table = value_table(w);
    alignas(64) uint16_t t[64];
    for (int i = 0; i < 64; i++) t[i] = table[i & ((1 << BITS) - 1)];
    t0 = _mm512_load_si512(t), t1 = _mm512_load_si512(t + 32);
  }
  AVX512 __m512i look_up(__m512i index) const { return _mm512_permutexvar_epi16(index, t0); }
};

AVX512 Pair decode(const Decoder<4>& d, const uint8_t* row, int64_t, int64_t s) {
  __m512i b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row + 32 * s)));
  return {d.look_up(b), d.look_up(_mm512_srli_epi16(b, 4))};
}

AVX512 Pair shifts_of_plane2(const uint8_t* p) {  // element pairs of a 2-bit slab in the lowest bits
  __m256i b = widen(p);
  __m512i both = two(b, _mm256_srli_epi16(b, 4));
  return {both, _mm512_srli_epi16(both, 2)};
}

AVX512 Pair decode(const Decoder<2>& d, const uint8_t* row, int64_t, int64_t s) {
  Pair i = shifts_of_plane2(row + 16 * s);
  return {d.look_up(i.first), d.look_up(i.second)};
}

AVX512 Pair decode(const Decoder<3>& d, const uint8_t* row, int64_t padded, int64_t s) {
  Pair low = shifts_of_plane2(row + 16 * s);
  __m256i b = _mm256_slli_epi16(widen(row + padded / 4 + 16 * (s / 2)), 2);  // bit 2 = element 0..15
  b = _mm256_srl_epi16(b, _mm_cvtsi32_si128(4 * int(s & 1)));
  __m512i high = two(b, _mm256_srli_epi16(b, 2));
  __m512i mask = _mm512_set1_epi16(3);
  // 0xCA: mask ? low : high
  return {d.look_up(_mm512_ternarylogic_epi32(mask, low.first, high, 0xCA)),
          d.look_up(_mm512_ternarylogic_epi32(mask, low.second, _mm512_srli_epi16(high, 1), 0xCA))};
}

AVX512 Pair decode(const Decoder<5>& d, const uint8_t* row, int64_t padded, int64_t s) {
  __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row + 32 * s)));
  __m256i b = _mm256_slli_epi16(widen(row + padded / 2 + 16 * (s / 2)), 4);  // bit 4 = element 0..15
  b = _mm256_srl_epi16(b, _mm_cvtsi32_si128(4 * int(s & 1)));
  __m512i high = two(b, _mm256_srli_epi16(b, 2));
  __m512i mask = _mm512_set1_epi16(15);
  return {d.look_up(_mm512_ternarylogic_epi32(mask, low, high, 0xCA)),
          d.look_up(_mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 4), _mm512_srli_epi16(high, 1), 0xCA))};
}

AVX512 Pair decode(const Decoder<6>& d, const uint8_t* row, int64_t padded, int64_t s) {
  __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(row + 32 * s)));
  __m256i b = _mm256_slli_epi16(widen(row + padded / 2 + 16 * s), 4);  // bits 4, 5 = element 0..15
  __m512i high = two(b, _mm256_srli_epi16(b, 4));
  __m512i mask = _mm512_set1_epi16(15);
  __m512i i0 = _mm512_ternarylogic_epi32(mask, low, high, 0xCA);
  __m512i i1 = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 4), _mm512_srli_epi16(high, 2), 0xCA);
  return {_mm512_permutex2var_epi16(d.t0, i0, d.t1), _mm512_permutex2var_epi16(d.t0, i1, d.t1)};
}

// 8-bit floats: 128 magnitudes as separate low and high bytes, two byte permutes and a blend each.
template <> struct Decoder<80> {
  __m512i low0, low1, high0, high1;
  AVX512 explicit Decoder(const Packed& w) {
    const uint16_t* table = value_table(w);
    alignas(64) uint8_t low[128], high[128];
    for (int i = 0; i < 128; i++) low[i] = uint8_t(table[i]), high[i] = uint8_t(table[i] >> 8);
    low0 = _mm512_load_si512(low), low1 = _mm512_load_si512(low + 64);
    high0 = _mm512_load_si512(high), high1 = _mm512_load_si512(high + 64);
  }
};

AVX512 Pair interleave(__m512i low, __m512i high) {  // bytes of 64 elements -> 16-bit values in decoder order
  __m512i even = _mm512_unpacklo_epi8(low, high);   // elements 0..7 of each 16
  __m512i odd = _mm512_unpackhi_epi8(low, high);    // elements 8..15 of each 16
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  return {_mm512_permutex2var_epi64(even, first, odd), _mm512_permutex2var_epi64(even, second, odd)};
}

AVX512 Pair decode(const Decoder<80>& d, const uint8_t* row, int64_t, int64_t s) {
  __m512i code = _mm512_loadu_si512(row + 64 * s);
  __m512i low = _mm512_permutex2var_epi8(d.low0, code, d.low1);
  __m512i high = _mm512_permutex2var_epi8(d.high0, code, d.high1);
  __m512i sign = _mm512_set1_epi8(char(0x80));
  return interleave(low, _mm512_ternarylogic_epi32(code, sign, high, 0xEA));  // (code & sign) | high
}

template <> struct Decoder<8> {  // integers: convert, minus 128 where the format is symmetric
  __m512i offset;
  AVX512 explicit Decoder(const Packed& w) { offset = _mm512_set1_epi32(w.zero ? 0 : 128); }
  AVX512 __m512 sixteen(const uint8_t* p) const {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), offset));
  }
};

AVX512 Pair decode(const Decoder<8>& d, const uint8_t* row, int64_t, int64_t s) {
  const uint8_t* p = row + 64 * s;
  return {(__m512i)_mm512_cvtne2ps_pbh(d.sixteen(p + 32), d.sixteen(p)),
          (__m512i)_mm512_cvtne2ps_pbh(d.sixteen(p + 48), d.sixteen(p + 16))};
}

// The last super of a row may be cut short where its planes allow less than 64 elements.
template <int KIND> AVX512 Pair decode_tail(const Decoder<KIND>& d, const uint8_t* row, const Packed& w, int64_t s) {
  alignas(64) uint8_t copy[64] = {0};
  constexpr int per_super = KIND == 4 ? 32 : 64;
  if constexpr (KIND == 4 || KIND == 8 || KIND == 80) {
    std::memcpy(copy, row + per_super * s, w.row_bytes - per_super * s);
    return decode(d, copy, 64, 0);
  }
  return decode(d, row, w.padded(), s);
}
