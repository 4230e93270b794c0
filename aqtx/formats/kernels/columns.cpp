// GPTQ within a leaf of a few columns: each column is rounded and its error made good by the leaf's later ones.
//
// A tile of 64 rows of one expert is brought into columns of 64 lanes and finished while it lies in the
// cache. The arithmetic is that of columns.py and rounding.py, addition for addition and without
// contraction, so that both give the same bits.
#include "packed.h"

constexpr int kLanes = 64, kWidth = 16, kVectors = kLanes / kWidth;
typedef float Vector __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

struct Round {
  float low, high;            // integers without a zero point, or the largest float
  float smallest, to_magic;   // floats
  bool is_float, has_zero;
};

static INLINE Round round_of(const ColumnsTask& t) {
  const float half = float(1 << (t.bits - 1));
  Round r{-half, half - 1, 0, 0, t.mantissa_bits > 0, t.zero != nullptr};
  if (r.is_float) {
    r.low = -t.largest, r.high = t.largest;
    r.smallest = as_float(uint32_t(128 - t.exponent_bias) << 23);
    r.to_magic = 1.5f * as_float(uint32_t(127 + 23 - t.mantissa_bits) << 23);
  }
  return r;
}

static INLINE float clamp(float v, float low, float high) { v = v > low ? v : low; return v < high ? v : high; }

// Integers: clamping to whole bounds before rounding is the same as after it.
static INLINE void round_integers(float* v, const float* zero, const Round& r, float levels) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23
  for (int l = 0; l < kLanes; l++) {
    const float low = r.has_zero ? -zero[l] : r.low, high = r.has_zero ? levels - zero[l] : r.high;
    v[l] = (clamp(v[l], low, high) + magic) - magic;
  }
}

static INLINE void round_floats(float* v, const Round& r) {
  for (int l = 0; l < kLanes; l++) {
    const float x = clamp(v[l], r.low, r.high);
    const float power = as_float(as_bits(x) & 0x7f800000);
    const float magic = (power > r.smallest ? power : r.smallest) * r.to_magic;
    v[l] = (x + magic) - magic;
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

static INLINE void tile(const ColumnsTask& t, int64_t expert, int64_t first, const float* ratios, float* scratch) {
  const int64_t B = t.high - t.low, K = t.num_columns, rows = t.num_rows - first < kLanes ? t.num_rows - first : kLanes;
  const Round r = round_of(t);
  const float levels = float((1 << t.bits) - 1);
  float *v = scratch, *e = scratch + B * kLanes;
  alignas(64) float scale[kLanes], zero[kLanes], sum[kLanes], q[kLanes];
  for (int l = 0; l < kLanes; l++) scale[l] = 1, zero[l] = 0, sum[l] = 0;
  const int64_t origin = (expert * t.num_rows + first) * K + t.low, groups = (expert * t.num_rows + first) * t.num_blocks;
  for (int64_t i = 0; i < 2 * B * kLanes; i++) scratch[i] = 0;
  for (int64_t l = 0; l < rows; l++)
    for (int64_t c = 0; c < B; c++) v[c * kLanes + l] = t.values[origin + l * K + c], e[c * kLanes + l] = t.weights[origin + l * K + c];
  int64_t block = -1;
  for (int64_t c = 0; c < B; c++) {
    const int64_t next = t.blocks ? t.blocks[expert * K + t.low + c] : (t.low + c) / t.block;
    if (next != block) {
      block = next;
      for (int64_t l = 0; l < rows; l++) scale[l] = t.scale[groups + l * t.num_blocks + block];
      if (t.zero) for (int64_t l = 0; l < rows; l++) zero[l] = t.zero[groups + l * t.num_blocks + block];
    }
    float *mine = v + c * kLanes, *error = e + c * kLanes;
    receive(mine, e, ratios + c * B, c);
    for (int l = 0; l < kLanes; l++) q[l] = mine[l] / scale[l];
    if (r.is_float) round_floats(q, r);
    else round_integers(q, zero, r, levels);
    const float penalty = t.penalties[expert * K + t.low + c], share = t.shares[expert];
    for (int l = 0; l < kLanes; l++) {
      const float rounded = q[l] * scale[l], step = mine[l] - rounded;
      error[l] -= rounded;
      sum[l] += penalty * (step * step) - share * (error[l] * error[l]);
    }
  }
  for (int64_t l = 0; l < rows; l++) t.bounds[expert * t.num_rows + first + l] += sum[l];
  for (int64_t l = 0; l < rows; l++)
    for (int64_t c = 0; c < B; c++) t.values[origin + l * K + c] = v[c * kLanes + l], t.errors[origin + l * K + c] = e[c * kLanes + l];
}

static INLINE void run_tiles(const ColumnsTask& t, int64_t begin, int64_t end) {
  const int64_t B = t.high - t.low, tiles = (t.num_rows + kLanes - 1) / kLanes;
  std::vector<float> ratios(B * B), scratch(2 * B * kLanes);
  int64_t loaded = -1;
  for (int64_t i = begin; i < end; i++) {
    const int64_t expert = i / tiles;
    if (expert != loaded) {  // transposed: what a column receives lies together
      loaded = expert;
      const float* from = t.ratios + expert * t.ratio_strides[0];
      for (int64_t row = 0; row < B; row++)
        for (int64_t c = 0; c < B; c++)
          ratios[c * B + row] = from[(t.low + row) * t.ratio_strides[1] + (t.low + c) * t.ratio_strides[2]];
    }
    tile(t, expert, i % tiles * kLanes, ratios.data(), scratch.data());
  }
}

FOR_EACH_CPU(run, (const ColumnsTask& t, int64_t a, int64_t b), (t, a, b), run_tiles(t, a, b))

int64_t column_tiles(int64_t num_rows) { return (num_rows + kLanes - 1) / kLanes; }
void round_columns(const ColumnsTask& task, int64_t begin, int64_t end) { run(task, begin, end); }
