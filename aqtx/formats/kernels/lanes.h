// Rounding of many lanes at a time: what GPTQ's columns, the sweeps and the search for scales have in common.
//
// The arithmetic is that of elements.py, addition for addition and without contraction, so that both give the same bits.
#pragma once
#include "packed.h"

constexpr int kLanes = 64, kWidth = 16, kVectors = kLanes / kWidth;
typedef float Vector __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

struct Round {
  float low, high;            // integers without a zero point, or the largest float
  float smallest, to_magic;   // floats
  bool is_float, has_zero;
};

static INLINE Round round_of(const Element& t, bool has_zero) {
  const float half = float(1 << (t.bits - 1));
  Round r{-half, half - 1, 0, 0, t.mantissa_bits > 0, has_zero};
  if (r.is_float) {
    r.low = -t.largest, r.high = t.largest;
    r.smallest = as_float(uint32_t(128 - t.exponent_bias) << 23);
    r.to_magic = 1.5f * as_float(uint32_t(127 + 23 - t.mantissa_bits) << 23);
  }
  return r;
}

static INLINE float clamp(float v, float low, float high) { v = v > low ? v : low; return v < high ? v : high; }

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23

// Integers: clamping to whole bounds before rounding is the same as after it.
template <int LANES> static INLINE void round_integers(float* v, const float* zero, const Round& r, float levels) {
  for (int l = 0; l < LANES; l++) {
    const float low = r.has_zero ? -zero[l] : r.low, high = r.has_zero ? levels - zero[l] : r.high;
    v[l] = (clamp(v[l], low, high) + kMagic) - kMagic;
  }
}

template <int LANES> static INLINE void round_floats(float* v, const Round& r) {
  for (int l = 0; l < LANES; l++) {
    const float x = clamp(v[l], r.low, r.high);
    const float power = as_float(as_bits(x) & 0x7f800000);
    const float magic = (power > r.smallest ? power : r.smallest) * r.to_magic;
    v[l] = as_float((as_bits((x + magic) - magic) & 0x7fffffff) | (as_bits(x) & 0x80000000));  // -0 has a code
  }
}

template <int LANES = kLanes> static INLINE void round_lanes(float* v, const float* zero, const Round& r, float levels) {
  if (r.is_float) round_floats<LANES>(v, r);
  else round_integers<LANES>(v, zero, r, levels);
}

// Codes of values that lie on the grid.
template <int LANES = kLanes>
static INLINE void codes_of(const float* v, const float* zero, const Round& r, const Element& t, uint8_t* code) {
  if (!r.is_float) {
    for (int l = 0; l < LANES; l++) code[l] = uint8_t(int(v[l] + (r.has_zero ? zero[l] : -r.low)));
    return;
  }
  const int drop = 23 - t.mantissa_bits;
  const uint32_t offset = uint32_t(128 - t.exponent_bias) << t.mantissa_bits, step = 1u << t.mantissa_bits;
  for (int l = 0; l < LANES; l++) {
    const float magnitude = as_float(as_bits(v[l]) & 0x7fffffff);
    const bool subnormal = magnitude < r.smallest;
    const uint32_t shifted = as_bits(subnormal ? magnitude + r.smallest : magnitude) >> drop;
    code[l] = uint8_t((shifted - (subnormal ? offset : offset - step)) | (as_bits(v[l]) >> 31) << (t.bits - 1));
  }
}

// v += sum of ratios[i] * errors[i], one addition after the other.
static INLINE void receive(float* v, const float* errors, const float* ratios, int64_t count) {
  Vector sum[kVectors];
  for (int k = 0; k < kVectors; k++) sum[k] = *(const Vector*)(v + kWidth * k);
  for (int64_t i = 0; i < count; i++)
    for (int k = 0; k < kVectors; k++) sum[k] += ratios[i] * *(const Vector*)(errors + i * kLanes + kWidth * k);
  for (int k = 0; k < kVectors; k++) *(Vector*)(v + kWidth * k) = sum[k];
}

template <typename T> static INLINE void copy(T* to, const T* from, int64_t count) {
  if (count == kLanes) __builtin_memcpy(to, from, sizeof(T) * kLanes);  // of a known length: a few vector moves
  else for (int64_t l = 0; l < count; l++) to[l] = from[l];
}
