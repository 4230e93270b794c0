// GPTQ within a leaf of a few columns: each column is rounded and its error made good by the leaf's later ones.
//
// Matrices lie columns first. A tile of 64 rows of one expert is finished while it lies in the cache, 64 lanes a
// column. The arithmetic is that of columns.py and rounding.py, addition for addition and without
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
    v[l] = as_float((as_bits((x + magic) - magic) & 0x7fffffff) | (as_bits(x) & 0x80000000));  // -0 has a code
  }
}

static INLINE void round_lanes(float* v, const float* zero, const Round& r, float levels) {
  if (r.is_float) round_floats(v, r);
  else round_integers(v, zero, r, levels);
}

// Codes of values that lie on the grid.
static INLINE void codes_of(const float* v, const float* zero, const Round& r, const ColumnsTask& t, uint8_t* code) {
  if (!r.is_float) {
    for (int l = 0; l < kLanes; l++) code[l] = uint8_t(int(v[l] + (r.has_zero ? zero[l] : -r.low)));
    return;
  }
  const int drop = 23 - t.mantissa_bits;
  const uint32_t offset = uint32_t(128 - t.exponent_bias) << t.mantissa_bits, step = 1u << t.mantissa_bits;
  for (int l = 0; l < kLanes; l++) {
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

static INLINE void tile(const ColumnsTask& t, int64_t expert, int64_t first, const float* ratios, float* scratch) {
  const int64_t B = t.high - t.low, K = t.num_columns, N = t.num_rows, rows = N - first < kLanes ? N - first : kLanes;
  const Round r = round_of(t);
  const float levels = float((1 << t.bits) - 1), share = t.shares[expert];
  float *v = scratch, *e = scratch + B * kLanes;
  alignas(64) float scale[kLanes], zero[kLanes], sum[kLanes], q[kLanes], near[kLanes];
  alignas(64) uint8_t code[kLanes];
  for (int l = 0; l < kLanes; l++) scale[l] = 1, zero[l] = 0, sum[l] = 0;
  const int64_t origin = (expert * K + t.low) * N + first;
  if (rows < kLanes) for (int64_t i = 0; i < 2 * B * kLanes; i++) scratch[i] = 0;
  for (int64_t c = 0; c < B; c++) {
    copy(v + c * kLanes, t.values + origin + c * N, rows);
    copy(e + c * kLanes, t.weights + origin + c * N, rows);
  }
  int64_t block = -1;
  for (int64_t c = 0; c < B; c++) {
    const int64_t next = t.blocks ? t.blocks[expert * K + t.low + c] : (t.low + c) / t.block;
    if (next != block) {
      block = next;
      const int64_t group = (expert * t.num_blocks + block) * N + first;
      copy(scale, t.scale + group, rows);
      if (t.zero) copy(zero, t.zero + group, rows);
    }
    float *mine = v + c * kLanes, *error = e + c * kLanes;  // `error` holds the weights until they are rounded
    receive(mine, e, ratios + c * B, c);
    for (int l = 0; l < kLanes; l++) q[l] = mine[l] / scale[l], near[l] = error[l] / scale[l];
    round_lanes(q, zero, r, levels);
    round_lanes(near, zero, r, levels);
    codes_of(q, zero, r, t, code);
    const float penalty = t.penalties[expert * K + t.low + c];
    for (int l = 0; l < kLanes; l++) {
      const float rounded = q[l] * scale[l], step = mine[l] - rounded;
      near[l] = error[l] - near[l] * scale[l];
      error[l] -= rounded;
      sum[l] += penalty * (step * step) - share * (error[l] * error[l]);
    }
    copy(t.nearest + origin + c * N, near, rows);
    copy(t.errors + origin + c * N, error, rows);
    copy(t.codes + origin + c * N, code, rows);
  }
  for (int64_t l = 0; l < rows; l++) t.bounds[expert * N + first + l] += sum[l];
}

static INLINE void run_tiles(const ColumnsTask& t, int64_t begin, int64_t end) {
  const int64_t B = t.high - t.low, tiles = (t.num_rows + kLanes - 1) / kLanes;
  std::vector<float> ratios(B * B), space(2 * B * kLanes + kWidth);
  float* scratch = space.data() + (kWidth - (uintptr_t(space.data()) / 4) % kWidth) % kWidth;  // whole cache lines
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
    tile(t, expert, i % tiles * kLanes, ratios.data(), scratch);
  }
}

FOR_EACH_CPU(run, (const ColumnsTask& t, int64_t a, int64_t b), (t, a, b), run_tiles(t, a, b))

int64_t column_tiles(int64_t num_rows) { return (num_rows + kLanes - 1) / kLanes; }
void round_columns(const ColumnsTask& task, int64_t begin, int64_t end) { run(task, begin, end); }
