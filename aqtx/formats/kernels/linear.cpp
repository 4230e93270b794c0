// Products with packed weights: AVX-512 BF16 where the processor has it, portable loops elsewhere; see also rounded.cpp.
#include "packed.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include "avx512.h"
#endif

// ---- portable ------------------------------------------------------------------------------------

// Where a quarter of 16 elements lies in decoder order.
static INLINE int64_t place_of(int64_t quarter) { return quarter == 1 ? 2 : quarter == 2 ? 1 : quarter; }

// 64 codes, one a byte, in decoder order.
template <int BITS> static INLINE void unpack_super(const Packed& w, const uint8_t* row, int64_t s, uint8_t* code) {
  for (int quarter = 0; quarter < 4; quarter++) {
    uint8_t* out = code + 16 * place_of(quarter);
    const int64_t first = kSuper * s + 16 * quarter;
    if (first >= w.padded()) {
      for (int j = 0; j < 16; j++) out[j] = 0;
      continue;
    }
    if constexpr (BITS == 8) {
      for (int j = 0; j < 16; j++) out[j] = row[first + j];
    } else if constexpr (BITS == 4 || BITS == 5 || BITS == 6) {
      const uint8_t* slab = row + first / 32 * 16;
      for (int j = 0; j < 16; j++) out[j] = (slab[j] >> (4 * (quarter & 1))) & 15;
    } else {
      const uint8_t* slab = row + 16 * s;
      for (int j = 0; j < 16; j++) out[j] = (slab[j] >> (2 * quarter)) & 3;
    }
    if constexpr (BITS == 6) {
      const uint8_t* slab = row + w.padded() / 2 + 16 * s;
      for (int j = 0; j < 16; j++) out[j] |= ((slab[j] >> (2 * quarter)) & 3) << 4;
    }
    if constexpr (BITS == 3 || BITS == 5) {
      const uint8_t* slab = row + w.padded() * (BITS - 1) / 8 + 16 * (s / 2);
      const int shift = 4 * int(s & 1) + quarter;
      for (int j = 0; j < 16; j++) out[j] |= ((slab[j] >> shift) & 1) << (BITS - 1);
    }
  }
}

// Arithmetic on bits, which compilers vectorise, where a table would be a gather.
static INLINE void values_of(const Packed& w, const uint8_t* code, float* value) {
  if (w.mantissa_bits == 0) {
    const float offset = w.zero ? 0.0f : float(1 << (w.bits - 1));
    for (int j = 0; j < kSuper; j++) value[j] = float(code[j]) - offset;
    return;
  }
  const uint32_t sign = 1u << (w.bits - 1), drop = 23 - w.mantissa_bits, bias = uint32_t(127 - w.exponent_bias) << 23;
  const float smallest = as_float(uint32_t(128 - w.exponent_bias) << 23);
  for (int j = 0; j < kSuper; j++) {
    const float normal = as_float(((code[j] & (sign - 1)) << drop) + bias);
    const float subnormal = 2.0f * normal - smallest;
    const uint32_t magnitude = as_bits(subnormal < normal ? subnormal : normal);
    value[j] = as_float(magnitude | ((code[j] & sign) << (32 - w.bits)));
  }
  if (w.bits == 8) {
    const int special = w.mantissa_bits == 3 ? 0x7f : 0x7c;
    for (int j = 0; j < kSuper; j++) {
      const float beyond = (code[j] & 0x7f) == 0x7c ? INFINITY : NAN;  // which E5M2 alone has as a code of its own
      value[j] = (code[j] & 0x7f) < special ? value[j] : code[j] & sign ? -beyond : beyond;
    }
  }
}

template <int BITS> static INLINE void decode_super(const Packed& w, const uint8_t* row, int64_t s, float* value) {
  alignas(64) uint8_t code[kSuper];
  unpack_super<BITS>(w, row, s, code);
  values_of(w, code, value);
}

// One row, dequantized, in decoder order.
template <int BITS> static INLINE void scaled_row(const Packed& w, int64_t n, float* scales, float* values) {
  const int64_t num_supers = supers(w.num_columns), step = scale_step(w);
  row_scales(w, n, scales);
  for (int64_t s = 0; s < num_supers; s++) {
    decode_super<BITS>(w, w.codes + n * w.row_bytes, s, values + kSuper * s);
    for (int quarter = 0; quarter < 4; quarter++) {
      float* v = values + kSuper * s + 16 * place_of(quarter);
      const int64_t k = kSuper * s + 16 * quarter;
      const float scale = scales[k / step];
      const float zero = w.zero && k < w.num_columns ? float(w.zero[n * w.num_blocks + k / w.block]) : 0.0f;
      for (int j = 0; j < 16; j++) v[j] = (v[j] - zero) * scale;
    }
  }
}

struct Scratch {
  std::vector<float> scales, values;
  explicit Scratch(const Packed& w)
      : scales(scales_per_row(w) + kSlack), values(supers(w.num_columns) * kSuper) {}
};

template <int BITS>
static INLINE void rows_portable(const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t n0, int64_t n1) {
  Scratch scratch(w);
  const float* values = scratch.values.data();
  for (int64_t n = n0; n < n1; n++) {
    scaled_row<BITS>(w, n, scratch.scales.data(), scratch.values.data());
    for (int64_t m = 0; m < x.num_rows; m++) {
      const float* xm = x.f32 + m * x.columns;
      float acc[16] = {0};
      for (int64_t k = 0; k < x.columns; k += 16)
        for (int j = 0; j < 16; j++) acc[j] += values[k + j] * xm[k + j];
      float sum = 0;
      for (int j = 0; j < 16; j++) sum += acc[j];
      y[m * ldy + n] = sum;
    }
  }
}

template <int BITS>
static INLINE void floats_of_rows(const Packed& w, float* out, int64_t n0, int64_t n1, float largest) {
  Scratch scratch(w);
  for (int64_t n = n0; n < n1; n++, out += w.num_columns) {
    scaled_row<BITS>(w, n, scratch.scales.data(), scratch.values.data());
    for (int64_t first = 0; first < w.num_columns; first += 16) {
      const float* v = scratch.values.data() + first / kSuper * kSuper + 16 * place_of(first / 16 % 4);
      const int64_t left = w.num_columns - first;
      for (int64_t j = 0; j < (left < 16 ? left : 16); j++)
        out[first + j] = v[j] < -largest ? -largest : v[j] > largest ? largest : v[j];
    }
  }
}

#define PORTABLE(BITS)                                                                                            \
  FOR_EACH_CPU(portable##BITS, (const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t a, int64_t b), \
               (w, x, y, ldy, a, b), rows_portable<BITS>(w, x, y, ldy, a, b))                                      \
  FOR_EACH_CPU(floats##BITS, (const Packed& w, float* out, int64_t a, int64_t b, float largest),                   \
               (w, out, a, b, largest), floats_of_rows<BITS>(w, out, a, b, largest))
PORTABLE(2) PORTABLE(3) PORTABLE(4) PORTABLE(5) PORTABLE(6) PORTABLE(8)

// ---- dispatch ------------------------------------------------------------------------------------

Cpu cpu() {
  static const Cpu found = [] {
    Cpu most = Cpu::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("x86-64-v3")) most = Cpu::avx2;
    if (__builtin_cpu_supports("x86-64-v4")) most = Cpu::avx512;
    if (most == Cpu::avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"))
      most = Cpu::avx512_bf16;
#endif
    const char* wanted = std::getenv("AQTX_CPU");
    const std::string name = wanted ? wanted : "";
    const Cpu least = name == "baseline" ? Cpu::baseline : name == "avx2" ? Cpu::avx2 : name == "avx512" ? Cpu::avx512 : most;
    return std::min(most, least);
  }();
  return found;
}

static INLINE void rounded(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = as_bits(from[i]), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}
FOR_EACH_CPU(round_all, (const float* from, int64_t count, uint16_t* to), (from, count, to), rounded(from, count, to))
void round_to_bf16(const float* from, int64_t count, uint16_t* to) { round_all(from, count, to); }

int64_t ordered_columns(const Packed& w, bool avx512) {
  const int64_t span = avx512 && w.bits == 4 ? kWide : kSuper;
  return (w.num_columns + span - 1) / span * span;
}

template <typename T> static void order_supers(const T* x, int64_t num_rows, int64_t num_columns, T* to) {
  const int64_t columns = supers(num_columns) * kSuper;
  for (int64_t m = 0; m < num_rows; m++)
    for (int64_t first = 0; first < columns; first += 16) {
      T* out = to + m * columns + first / kSuper * kSuper + 16 * place_of(first / 16 % 4);
      for (int64_t j = 0; j < 16; j++) out[j] = first + j < num_columns ? x[m * num_columns + first + j] : T(0);
    }
}

void order_activations(const float* x, int64_t num_rows, const Packed& w, float* to) {
  order_supers(x, num_rows, w.num_columns, to);
}

void order_activations(const uint16_t* x, int64_t num_rows, const Packed& w, uint16_t* to) {
#if defined(__x86_64__)
  if (w.bits == 4) return order_for_four(x, num_rows, w.num_columns, ordered_columns(w, true), to);
#endif
  order_supers(x, num_rows, w.num_columns, to);
}

// An asymmetric weight is (code - zero) * scale: the zeros are taken off through the blocks' sums of x.
static void subtract_zeros(const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t n0, int64_t n1) {
  std::vector<float> shift(w.num_blocks);
  for (int64_t n = n0; n < n1; n++) {
    block_scales(w, n, shift.data());
    for (int64_t b = 0; b < w.num_blocks; b++) shift[b] *= float(w.zero[n * w.num_blocks + b]);
    for (int64_t m = 0; m < x.num_rows; m++) {
      float sum = 0;
      for (int64_t b = 0; b < w.num_blocks; b++) sum += shift[b] * x.block_sums[m * w.num_blocks + b];
      y[m * ldy + n] -= sum;
    }
  }
}

void linear_rows(const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t n0, int64_t n1) {
#if defined(__x86_64__)
  if (x.bf16) {
    auto run = w.bits == 2 ? rows_avx512<2> : w.bits == 3 ? rows_avx512<3> : w.bits == 4 ? rows_avx512<4>
             : w.bits == 5 ? rows_avx512<5> : w.bits == 6 ? rows_avx512<6> : w.mantissa_bits ? rows_avx512<80> : rows_avx512<8>;
    run(w, x, y, ldy, n0, n1);
    if (w.zero) subtract_zeros(w, x, y, ldy, n0, n1);
    return;
  }
#endif
  auto run = w.bits == 2 ? portable2 : w.bits == 3 ? portable3 : w.bits == 4 ? portable4
           : w.bits == 5 ? portable5 : w.bits == 6 ? portable6 : portable8;
  run(w, x, y, ldy, n0, n1);
}

// The processor's conversion to bf16 makes subnormals zero and large values infinite: rows whose scales can lead
// there, and those with a NaN, are converted by the portable code instead.
struct Range {
  float low, high;  // of scales
  explicit Range(const Packed& w) : low(0), high(0) {
    float least = INFINITY, most = 1;
    for (int code = 0; code < (1 << w.bits); code++) {
      const float v = std::fabs(code_value(w, code));
      if (v > 0 && std::isfinite(v)) least = std::min(least, v), most = std::max(most, v);
    }
    low = 0x1p-126f / std::min(least, 1.0f), high = 0x1p127f / most;
  }
  bool holds(const Packed& w, int64_t row, float* scales) const {
    block_scales(w, row, scales);
    bool inside = true;
    for (int64_t b = 0; b < w.num_blocks; b++) inside &= std::fabs(scales[b]) >= low && std::fabs(scales[b]) <= high;
    if (w.bits == 8 && w.mantissa_bits == 2)  // E5M2 has a code of infinity
      for (int64_t k = 0; k < w.row_bytes; k++) inside &= (w.codes[row * w.row_bytes + k] & 0x7f) != 0x7c;
    return inside;
  }
};

void dequantize_rows(const Packed& w, uint16_t* out, int64_t n0, int64_t n1) {
#if defined(__x86_64__)
  auto run = w.bits == 2 ? dequantize_avx512<2> : w.bits == 3 ? dequantize_avx512<3> : w.bits == 4 ? dequantize_avx512<4>
           : w.bits == 5 ? dequantize_avx512<5> : w.bits == 6 ? dequantize_avx512<6> : w.mantissa_bits ? dequantize_avx512<80> : dequantize_avx512<8>;
  const Range range(w);
  std::vector<float> space(std::max(w.num_columns, w.num_blocks));
  for (int64_t n = n0, done = n0; n < n1; done = n) {
    while (n < n1 && range.holds(w, n, space.data())) n++;
    if (n > done) run(w, out + (done - n0) * w.num_columns, done, n);
    if (n == n1) break;
    dequantize_rows(w, space.data(), n, n + 1, kLargestBf16);
    round_to_bf16(space.data(), w.num_columns, out + (n++ - n0) * w.num_columns);
  }
#endif
}

void dequantize_rows(const Packed& w, float* out, int64_t n0, int64_t n1, float largest) {
  auto run = w.bits == 2 ? floats2 : w.bits == 3 ? floats3 : w.bits == 4 ? floats4
           : w.bits == 5 ? floats5 : w.bits == 6 ? floats6 : floats8;
  run(w, out, n0, n1, largest);
}
