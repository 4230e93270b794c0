// Packed codes as bytes, 64 at a time, for processors with AVX2.
#pragma once
#include <immintrin.h>

#include "packed.h"

#define TARGET __attribute__((target("avx2,fma")))
#define AVX2 TARGET __attribute__((always_inline)) inline

constexpr int kFloat4 = 40, kFloat6 = 60;  // kinds beside the bits of integers: E2M1 and E2M3

struct Bytes { __m256i first, second; };  // elements 0..15 and 32..47, 16..31 and 48..63, in one byte each

AVX2 __m256i twice(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }
AVX2 __m256i both(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
AVX2 __m256i only(__m256i a, int bits) { return _mm256_and_si256(a, _mm256_set1_epi8(char(bits))); }
AVX2 __m256i down(__m256i a, int by) { return _mm256_srli_epi16(a, by); }
AVX2 __m256i up(__m256i a, int by) { return _mm256_slli_epi16(a, by); }

AVX2 Bytes nibbles(const uint8_t* p) {
  const __m256i b = _mm256_loadu_si256((const __m256i*)p);
  return {only(b, 15), only(down(b, 4), 15)};
}
// 16 bytes and the same with other halves shifted down.
AVX2 __m256i fanned(__m128i b, int by) { return twice(b, _mm_srl_epi16(b, _mm_cvtsi32_si128(by))); }
AVX2 __m128i slab(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
AVX2 __m256i fanned_bits(const uint8_t* p, int64_t s) {
  return fanned(_mm_srl_epi16(slab(p + 16 * (s / 2)), _mm_cvtsi32_si128(4 * int(s & 1))), 2);
}

// The s-th 64 codes of a row, as integers without a sign.
template <int KIND> AVX2 Bytes codes_of(const uint8_t* row, int64_t padded, int64_t s) {
  if constexpr (KIND == 8) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)(row + 64 * s)), b = _mm256_loadu_si256((const __m256i*)(row + 64 * s + 32));
    return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
  } else if constexpr (KIND == 2 || KIND == 3) {
    const __m256i v = fanned(slab(row + 16 * s), 4);
    const Bytes low{only(v, 3), only(down(v, 2), 3)};
    if constexpr (KIND == 2) return low;
    const __m256i h = fanned_bits(row + padded / 4, s);
    return {both(low.first, only(up(h, 2), 4)), both(low.second, only(up(h, 1), 4))};
  } else if constexpr (KIND == 5) {
    const Bytes low = nibbles(row + 32 * s);
    const __m256i h = fanned_bits(row + padded / 2, s);
    return {both(low.first, only(up(h, 4), 16)), both(low.second, only(up(h, 3), 16))};
  } else if constexpr (KIND == 6 || KIND == kFloat6) {
    const Bytes low = nibbles(row + 32 * s);
    const __m256i h = fanned(slab(row + padded / 2 + 16 * s), 4);
    return {both(low.first, only(up(h, 4), 48)), both(low.second, only(up(h, 2), 48))};
  } else {
    return nibbles(row + 32 * s);
  }
}

// Values in the format's unit plus its offset: tables of 16.
template <int KIND> AVX2 __m256i values_of(__m256i code) {
  if constexpr (KIND == kFloat4) {
    const __m128i table = _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), code);
  } else if constexpr (KIND == kFloat6) {
    const __m128i low = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m128i high = _mm_setr_epi8(16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60);
    const __m256i near = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), code);
    const __m256i far = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(high), code);
    const __m256i magnitude = _mm256_blendv_epi8(near, far, up(code, 3));  // by bit 4
    const __m256i sign = both(up(code, 2), _mm256_set1_epi8(1));           // bit 5
    return _mm256_add_epi8(_mm256_sign_epi8(magnitude, sign), _mm256_set1_epi8(60));
  } else {
    return code;
  }
}
