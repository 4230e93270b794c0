// Products of packed rows with activations that were rounded to integers, 32 at a time. No torch in here.
//
// A block of 32 activations is integers times its largest magnitude over 32767 (16 bits) or 127 (8 bits). Codes, or
// small multiples of their values, are integers too, so a block's products add up exactly before they are scaled.
// With 16 bits an activation is off by at most 2^-16 of its block's largest, less than bf16 leaves of that one.
#pragma once
#include "packed.h"

// What a row of activations was rounded to; `zero_sums` are sums of blocks times their ratio, and times what codes of
// a format without zero points are above their values.
struct Rounded {
  std::vector<int16_t> wide;    // [M, columns], of 16 bits or of a format of 8
  std::vector<int8_t> narrow;   // [M, columns], else
  std::vector<float> ratios;    // [M, supers, 8]: scales of a super's two blocks over the row's largest, four times each
  std::vector<float> zero_sums; // [M, stride]
  std::vector<float> top;       // [M] largest scale, times the unit of the format's values
  int64_t num_rows = 0, columns = 0, stride = 0;
};

// Whether a format's values are small integers in one unit, and the processor has the instructions.
bool can_round(const Packed& w);
// False where an activation is not finite; nothing can be done with such a row here.
bool round_activations(const float* x, int64_t num_rows, const Packed& w, int bits, Rounded& to);
// y[m, n0..n1), as `linear_rows`.
void rounded_rows(const Packed& w, const Rounded& x, float* y, int64_t ldy, int64_t n0, int64_t n1);
