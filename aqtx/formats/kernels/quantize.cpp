// Round-to-nearest of weights to MX formats, straight into the memory layout.
//
// The same arithmetic as elements.py and scale_search.py, on one block of 32 at a time; compiled without
// contraction, so that every result is the same bit for bit. Plain loops over 32 lanes: the compiler
// makes vectors of them for each kind of processor.
#include "packed.h"

constexpr int kBlock = 32;

// The dtypes' bits as float32 bits.
static INLINE uint32_t widen(const float* p, int j) { return as_bits(p[j]); }
static INLINE uint32_t widen(const uint16_t* p, int j) { return uint32_t(p[j]) << 16; }
static INLINE uint32_t widen(const _Float16* p, int j) { return as_bits(float(p[j])); }

static INLINE int exponent_byte(uint32_t amax, const MxTask& t) {
  if (amax >= 0x7f800000) return 255;  // NaN or infinity: the caller looks for it
  const int max_exponent = int((as_bits(t.largest) >> 23)) - 127;
  int byte;
  if (t.rule == 2) {
    const uint32_t quotient = as_bits(as_float(amax) / t.largest);
    byte = quotient <= (1u << 22) ? 0 : int(quotient >> 23) + int((quotient & 0x7fffff) > 0);
  } else {
    const uint32_t half = t.rule == 1 ? 1u << (22 - t.mantissa_bits) : 0;
    byte = int((amax + half) >> 23) - max_exponent;
  }
  return byte < 0 ? 0 : byte > 254 ? 254 : byte;
}

// v / 2^(byte - 127): two exact multiplications, since the factor alone may be out of range.
struct Factor { float first, second; };
static INLINE Factor factor_of(int byte) {
  const int power = 127 - byte, half = power / 2;
  return {as_float(uint32_t(127 + half) << 23), as_float(uint32_t(127 + power - half) << 23)};
}

// Codes of a block's magnitudes at an exponent; returns the sum of their squared errors, added as scale_search.py does.
static INLINE float codes_at(int byte, const uint32_t* bits, const MxTask& t, uint8_t* code) {
  const Factor factor = factor_of(byte);
  const int drop = 23 - t.mantissa_bits, min_exponent = 1 - t.exponent_bias;
  const float smallest = as_float(uint32_t(127 + min_exponent) << 23);
  const float to_magic = 1.5f * as_float(uint32_t(127 + drop) << 23);
  const uint32_t offset = uint32_t(127 + min_exponent) << t.mantissa_bits, step = 1u << t.mantissa_bits;
  const float scale = byte ? as_float(uint32_t(byte) << 23) : as_float(1u << 22);
  alignas(64) float error[kBlock];
  for (int j = 0; j < kBlock; j++) {
    const float magnitude = as_float(bits[j] & 0x7fffffff);
    float v = magnitude * factor.first * factor.second;
    v = v < t.largest ? v : t.largest;
    float power = as_float(as_bits(v) & 0x7f800000);
    power = power > smallest ? power : smallest;
    const float magic = power * to_magic;
    const float rounded = (v + magic) - magic;
    const bool subnormal = rounded < smallest;
    const uint32_t shifted = as_bits(subnormal ? rounded + smallest : rounded) >> drop;
    const uint32_t sign = (bits[j] >> 31) << (t.bits - 1);
    code[j] = uint8_t((shifted - (subnormal ? offset : offset - step)) | sign);
    const float off = rounded * scale - magnitude;
    error[j] = off * off;
  }
  for (int half = kBlock / 2; half > 0; half /= 2)
    for (int j = 0; j < half; j++) error[j] += error[j + half];
  return error[0];
}

template <typename T> static INLINE uint8_t block_codes(const T* from, const MxTask& t, uint8_t* code) {
  alignas(64) uint32_t bits[kBlock];
  uint32_t amax = 0;
  for (int j = 0; j < kBlock; j++) bits[j] = widen(from, j);
  for (int j = 0; j < kBlock; j++) amax = (bits[j] & 0x7fffffff) > amax ? bits[j] & 0x7fffffff : amax;
  const int own = exponent_byte(amax, t);
  float least = codes_at(own, bits, t, code);
  if (t.rule != 3 || own == 255) return uint8_t(own);
  int best = own;
  for (int byte : {own + 1, own - 1}) {  // as EXPONENTS_TRIED of scale_rules.py: the first one among equals
    if (byte < 0 || byte > 254) continue;
    alignas(64) uint8_t other[kBlock];
    const float error = codes_at(byte, bits, t, other);
    if (error < least) least = error, best = byte, __builtin_memcpy(code, other, kBlock);
  }
  return uint8_t(best);
}

// Codes of a row, one a byte, into split planes; `code` is zero-padded to whole slabs.
static INLINE void pack_row(const uint8_t* code, const MxTask& t, uint8_t* row) {
  const int64_t padded = t.row_bytes * 8 / t.bits;
  if (t.bits == 8) {
    for (int64_t k = 0; k < padded; k++) row[k] = code[k];
    return;
  }
  for (int64_t s = 0; s < padded / 32; s++)
    for (int j = 0; j < 16; j++)
      row[16 * s + j] = uint8_t((code[32 * s + j] & 15) | (code[32 * s + 16 + j] << 4));
  if (t.bits == 6)
    for (int64_t s = 0; s < padded / 64; s++)
      for (int j = 0; j < 16; j++) {
        const uint8_t* c = code + 64 * s + j;
        row[padded / 2 + 16 * s + j] =
            uint8_t((c[0] >> 4) | ((c[16] >> 4) << 2) | ((c[32] >> 4) << 4) | ((c[48] >> 4) << 6));
      }
}

template <typename T> static INLINE void quantize_rows(const MxTask& t, int64_t n0, int64_t n1) {
  const int64_t whole = t.num_columns / kBlock, num_blocks = (t.num_columns + kBlock - 1) / kBlock;
  std::vector<uint8_t> codes(t.row_bytes * 8 / t.bits + kBlock, 0);
  for (int64_t n = n0; n < n1; n++) {
    const T* row = (const T*)t.weight + n * t.num_columns;
    for (int64_t b = 0; b < whole; b++)
      t.scale[n * num_blocks + b] = block_codes(row + kBlock * b, t, codes.data() + kBlock * b);
    if (whole < num_blocks) {
      T last[kBlock] = {};
      const int64_t left = t.num_columns - kBlock * whole;
      for (int64_t j = 0; j < left; j++) last[j] = row[kBlock * whole + j];
      t.scale[n * num_blocks + whole] = block_codes(last, t, codes.data() + kBlock * whole);
    }
    pack_row(codes.data(), t, t.codes + n * t.row_bytes);
  }
}

FOR_EACH_CPU(rows_f32, (const MxTask& t, int64_t n0, int64_t n1), (t, n0, n1), quantize_rows<float>(t, n0, n1))
FOR_EACH_CPU(rows_bf16, (const MxTask& t, int64_t n0, int64_t n1), (t, n0, n1), quantize_rows<uint16_t>(t, n0, n1))
FOR_EACH_CPU(rows_f16, (const MxTask& t, int64_t n0, int64_t n1), (t, n0, n1), quantize_rows<_Float16>(t, n0, n1))

void quantize_mx_rows(const MxTask& task, int64_t n0, int64_t n1) {
  (task.dtype == 0 ? rows_f32 : task.dtype == 1 ? rows_bf16 : rows_f16)(task, n0, n1);
}
