// The scale of least weighted squared error among candidates, see scale_search.py: the same bits as there.
//
// Squares are summed in 16 lanes, and the lanes in halves, which is an order that plain torch can follow.
#include "lanes.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are returned by inlined functions only

typedef int Places __attribute__((vector_size(4 * kWidth)));

static INLINE float lane_sum(Vector v) {
  v += __builtin_shuffle(v, Places{8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15});
  v += __builtin_shuffle(v, Places{4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7});
  v += __builtin_shuffle(v, Places{2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3});
  return v[0] + v[1];
}

static INLINE float as_bf16(float v) {
  const uint32_t bits = as_bits(v);
  return as_float((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

struct Errors { float same, turned; };  // of a scale, and of its negative where that is asked for

static INLINE Vector splat(float v) { return v - Vector{}; }
static INLINE Vector least(Vector a, Vector b) { return a < b ? a : b; }
static INLINE Vector most(Vector a, Vector b) { return a > b ? a : b; }

template <bool kBf16> static INLINE Vector squares(Vector q, Vector scale, Vector value) {
  Vector product = q * scale;
  if (kBf16) for (int l = 0; l < kWidth; l++) product[l] = as_bf16(product[l]);
  const Vector off = product - value;
  return off * off;
}

// Of symmetric integers; a negative scale changes the sign of steps, and which end reaches further.
template <bool kBf16>
static INLINE Errors errors_of_both(const ScaleTask& t, const float* values, const float* importance, float scale, const Round& r) {
  Vector same{}, turned{};
  const Vector inverse = splat(1 / scale), factor = splat(scale), magic = splat(kMagic);
  const Vector low = splat(r.low), high = splat(r.high), far = splat(-r.low), near = splat(-r.high);
  for (int64_t at = 0; at < t.padded; at += kWidth) {
    const Vector value = *(const Vector*)(values + at), weight = *(const Vector*)(importance + at);
    const Vector q = (least(most(value * inverse, low), far) + magic) - magic;
    same += squares<kBf16>(least(q, high), factor, value) * weight;
    turned += squares<kBf16>(most(q, near), factor, value) * weight;
  }
  return {lane_sum(same), lane_sum(turned)};
}

template <bool kBf16>
static INLINE float error_of(const ScaleTask& t, const float* values, const float* importance, float scale, const float* zero,
                             const Round& r, float levels) {
  alignas(64) float sum[kWidth] = {}, q[kWidth];
  const float inverse = 1 / scale;
  for (int64_t at = 0; at < t.padded; at += kWidth) {
    for (int l = 0; l < kWidth; l++) q[l] = values[at + l] * inverse;
    round_lanes<kWidth>(q, zero, r, levels);
    for (int l = 0; l < kWidth; l++) {
      const float value = q[l] * scale, off = (kBf16 ? as_bf16(value) : value) - values[at + l];
      sum[l] += (off * off) * importance[at + l];
    }
  }
  return lane_sum(*(const Vector*)sum);
}

template <bool kBf16>
static INLINE Errors errors_of(const ScaleTask& t, const float* values, const float* importance, float scale, const float* zero,
                               const Round& r, float levels) {
  if (t.both_signs) return errors_of_both<kBf16>(t, values, importance, scale, r);
  return {error_of<kBf16>(t, values, importance, scale, zero, r, levels), 0};
}

static INLINE void run_scales(const ScaleTask& t, int64_t begin, int64_t end) {
  const Round r = round_of(t.element, t.zero != nullptr);
  const float levels = float((1 << t.element.bits) - 1);
  alignas(64) float zero[kWidth] = {};
  for (int64_t run = begin; run < end; run++) {
    const float *values = t.values + run * t.padded, *importance = t.importance + run % t.num_weights * t.padded;
    Errors least{};
    int64_t best = 0, turned = 0;
    for (int64_t c = 0; c < t.num_candidates; c++) {
      const float scale = t.scale[c * t.num_runs + run];
      if (t.zero) for (int l = 0; l < kWidth; l++) zero[l] = t.zero[c * t.num_runs + run];
      const Errors now = t.to_bf16 ? errors_of<true>(t, values, importance, scale, zero, r, levels)
                                   : errors_of<false>(t, values, importance, scale, zero, r, levels);
      if (c == 0 || now.same < least.same) least.same = now.same, best = c;
      if (c == 0 || now.turned < least.turned) least.turned = now.turned, turned = c;
    }
    t.best[run] = t.both_signs && least.turned < least.same ? t.num_candidates + turned : best;
  }
}

FOR_EACH_CPU(search, (const ScaleTask& t, int64_t a, int64_t b), (t, a, b), run_scales(t, a, b))

void best_scales(const ScaleTask& task, int64_t begin, int64_t end) { search(task, begin, end); }
