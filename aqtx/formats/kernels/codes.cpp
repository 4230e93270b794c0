// What codes and stored scales mean: tables of values, and the scales of a row.
#include "packed.h"

#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

float code_value(const Packed& w, int code) {
  if (w.mantissa_bits == 0) return float(w.zero ? code : code - (1 << (w.bits - 1)));
  const int sign = 1 << (w.bits - 1), magnitude = code & (sign - 1);
  if (w.bits == 8 && magnitude >= (w.mantissa_bits == 3 ? 0x7f : 0x7c))  // E4M3 has no infinity
    return magnitude > 0x7c ? NAN : code & sign ? -INFINITY : INFINITY;
  const int exponent = magnitude >> w.mantissa_bits, mantissa = magnitude & ((1 << w.mantissa_bits) - 1);
  const int whole = exponent ? mantissa | (1 << w.mantissa_bits) : mantissa;
  const float value = std::ldexp(float(whole), (exponent ? exponent : 1) - w.exponent_bias - w.mantissa_bits);
  return code & sign ? -value : value;
}

const uint16_t* value_table(const Packed& w) {
  static std::map<std::tuple<int, int, bool>, std::array<uint16_t, 256>> tables;
  static std::mutex lock;
  std::lock_guard<std::mutex> guard(lock);
  auto [found, fresh] = tables.try_emplace({w.bits, w.mantissa_bits, w.zero != nullptr});
  if (fresh)
    for (int code = 0; code < (1 << w.bits); code++) found->second[code] = to_bf16(code_value(w, code));
  return found->second.data();
}

static const float* e4m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> t{};
    const Packed e4m3{nullptr, nullptr, nullptr, 1.0f, 8, 3, 7};
    for (int code = 0; code < 256; code++) t[code] = code_value(e4m3, code);
    return t;
  }();
  return table.data();
}

// The stored scales of one row as float32, one per block.
static INLINE void scales_of_row(const Packed& w, int64_t row, const float* e4m3, float* out) {
  const int64_t base = row * w.num_blocks;
  if (w.scale_kind == ScaleKind::e8m0) {
    const uint8_t* from = w.scale + base;
    for (int64_t b = 0; b < w.num_blocks; b++) {
      const uint32_t bits = uint32_t(from[b]) << 23;
      out[b] = as_float(from[b] == 255 ? 0x7fc00000 : bits > (1u << 22) ? bits : 1u << 22);  // byte 0 is 2^-127
    }
  } else if (w.scale_kind == ScaleKind::bf16) {
    const uint16_t* from = (const uint16_t*)w.scale + base;
    for (int64_t b = 0; b < w.num_blocks; b++) out[b] = as_float(uint32_t(from[b]) << 16);
  } else {
    const uint8_t* from = w.scale + base;
    for (int64_t b = 0; b < w.num_blocks; b++) out[b] = e4m3[from[b]] * w.per_tensor;
  }
}
FOR_EACH_CPU(scales_for, (const Packed& w, int64_t row, float* out), (w, row, out),
             scales_of_row(w, row, e4m3_table(), out))
void block_scales(const Packed& w, int64_t row, float* out) { scales_for(w, row, out); }

template <int TIMES> static void repeat(float* values, int64_t count) {  // in place, from the back
  for (int64_t i = count - 1; i >= 0; i--) {
    const float value = values[i];
    for (int j = 0; j < TIMES; j++) values[TIMES * i + j] = value;
  }
}

void row_scales(const Packed& w, int64_t row, float* out) {
  const int64_t step = scale_step(w), count = scales_per_row(w);
  block_scales(w, row, out);
  int64_t filled = w.num_blocks;
  if (w.num_blocks == 1) {
    for (; filled < count; filled++) out[filled] = out[0];
    return;
  }
  if (w.block == 2 * step) repeat<2>(out, filled), filled *= 2;
  if (w.block == 4 * step) repeat<4>(out, filled), filled *= 4;
  for (; filled < count; filled++) out[filled] = 0.0f;
}
