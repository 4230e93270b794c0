// A packed weight matrix as the kernels see it, and what they do with one. No torch in here.
//
// Layout (see packing.py): a row is planes of 4, 2, 1 or 8 bits; byte j of a 16-byte slab holds elements
// j, j + 16, j + 32, ... . All decoders work on 64 elements at a time and yield them in two vectors,
//   first  = elements 0..15 and 32..47,   second = elements 16..31 and 48..63,
// which is the order in which slabs come apart with shifts only. Activations are brought into the same
// order once per call. (Four bits have a faster way of their own, see avx512_four.h.) Every element of at
// most 8 bits is exact in bf16, so products are exact in float32.
#pragma once
#include <cstdint>
#include <vector>

// What the processor can do; AQTX_CPU=avx512, avx2 or baseline makes it less, for tests.
enum class Cpu { baseline, avx2, avx512, avx512_bf16 };
Cpu cpu();

// A function compiled for each kind of processor from one body, which must be INLINE.
#if defined(__x86_64__)
#define FOR_EACH_CPU(NAME, PARAMETERS, ARGUMENTS, BODY)                                       \
  __attribute__((target("arch=x86-64-v4"))) static void NAME##_v4 PARAMETERS { BODY; }       \
  __attribute__((target("arch=x86-64-v3"))) static void NAME##_v3 PARAMETERS { BODY; }       \
  static void NAME##_v1 PARAMETERS { BODY; }                                                  \
  static void NAME PARAMETERS {                                                               \
    (cpu() >= Cpu::avx512 ? NAME##_v4 : cpu() == Cpu::avx2 ? NAME##_v3 : NAME##_v1) ARGUMENTS; \
  }
#else
#define FOR_EACH_CPU(NAME, PARAMETERS, ARGUMENTS, BODY) \
  static void NAME PARAMETERS { BODY; }
#endif

enum class ScaleKind : int64_t { e8m0 = 0, bf16 = 1, e4m3 = 2 };

struct Packed {
  const uint8_t* codes;
  const uint8_t* scale;  // num_blocks stored scales a row
  const uint8_t* zero;   // num_blocks a row, or null
  float per_tensor;      // NVFP4
  int bits, mantissa_bits, exponent_bias;  // mantissa_bits 0: an integer
  ScaleKind scale_kind;
  int64_t num_columns, block, num_blocks, row_bytes;

  int64_t padded() const { return row_bytes * 8 / bits; }
};

// Inlined into each processor's clone of its caller, so that it is compiled for that processor too.
#define INLINE __attribute__((always_inline)) inline

constexpr int64_t kSuper = 64, kWide = 128;
inline int64_t supers(int64_t columns) { return (columns + kSuper - 1) / kSuper; }

INLINE float as_float(uint32_t bits) { float f; __builtin_memcpy(&f, &bits, 4); return f; }
INLINE uint32_t as_bits(float f) { uint32_t bits; __builtin_memcpy(&bits, &f, 4); return bits; }
inline uint16_t to_bf16(float f) {  // nearest even
  uint32_t bits = as_bits(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The value of a code, and of every code (an asymmetric integer's is the code itself), as bf16.
float code_value(const Packed& w, int code);
const uint16_t* value_table(const Packed& w);
// The stored scales of a row as float32, one per block.
void block_scales(const Packed& w, int64_t row, float* out);
// float32 scales of one row, one per 32 elements (per 16 for blocks of 16), zero-padded to whole 128 elements.
void row_scales(const Packed& w, int64_t row, float* out);
constexpr int64_t kSlack = 8;  // floats that a ragged last block may write past them
inline int64_t scale_step(const Packed& w) { return w.block == 16 ? 16 : 32; }
inline int64_t scales_per_row(const Packed& w) { return (w.num_columns + kWide - 1) / kWide * (kWide / scale_step(w)); }

// y[m, n0..n1) = sum_k x[m, k] w[n, k]. `x` holds `columns` values a row, zero-padded, in decoder order.
struct Activations {
  const uint16_t* bf16;  // for avx512_bf16
  const float* f32;      // for the portable kernel, same order
  const float* block_sums;  // [M, num_blocks], only for asymmetric weights
  int64_t num_rows, columns;
};
int64_t ordered_columns(const Packed& w, bool avx512);
void order_activations(const uint16_t* x, int64_t num_rows, const Packed& w, uint16_t* to);  // for avx512_bf16
void order_activations(const float* x, int64_t num_rows, const Packed& w, float* to);
void round_to_bf16(const float* from, int64_t count, uint16_t* to);  // NaN stays NaN
void linear_rows(const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t n0, int64_t n1);
// Dequantized rows n0..n1, [n1 - n0, K]: bf16 with AVX-512 BF16 only, float32 everywhere. Values beyond `largest`
// become it and NaN stays NaN, as in decode.py; bf16 likewise, with its own largest.
constexpr float kLargestFloat = 0x1.fffffep127f, kLargestBf16 = 0x1.fep127f;
void dequantize_rows(const Packed& w, uint16_t* out, int64_t n0, int64_t n1);
void dequantize_rows(const Packed& w, float* out, int64_t n0, int64_t n1, float largest);

// Round-to-nearest of `rows` rows of K weights to an MX format: codes in the memory layout and E8M0 bytes.
struct MxTask {
  const void* weight;
  int dtype;  // 0 float32, 1 bf16, 2 fp16
  uint8_t* codes;
  uint8_t* scale;
  int64_t num_columns, row_bytes;
  int bits, mantissa_bits, exponent_bias;
  float largest;
  int rule;  // 0 floor, 1 even, 2 rceil, 3 search
};
void quantize_mx_rows(const MxTask& task, int64_t n0, int64_t n1);

struct Element {
  int bits, mantissa_bits, exponent_bias;  // mantissa_bits 0: an integer
  float largest;
};

// GPTQ's rounding of columns low..high of [E, K, N] matrices, errors of earlier columns made good already.
struct ColumnsTask {
  const float* values;   // what to round but for the errors of the leaf's earlier columns
  const float* weights;
  float* errors;         // out: weights less rounded values
  uint8_t* codes;        // out: of the rounded values
  const float* ratios;   // [E, K, K]
  const float* scale;    // [E, num_blocks, N]
  const float* zero;     // the same, or null
  const int64_t* blocks; // [E, K] block of each column, or null for column / block
  const float* penalties;  // [E, K]
  float* bounds;           // [E, N], to which penalty * (value - rounded)^2 of each column is added
  int64_t num_rows, num_columns, num_blocks, block, low, high;
  Element element;
};
int64_t column_tiles(int64_t num_rows);
void round_columns(const ColumnsTask& task, int64_t begin, int64_t end);  // tiles, all experts' in a row

// Coordinate descent on the codes of rows: each code in turn takes the value that is best given all others.
struct DescentTask {
  const float* gradient;  // [E, N, K] errors times H
  const float* weights;   // [E, N, K]
  float* errors;          // weights less values
  uint8_t* codes;
  const float* hessian;   // [E, K, K], symmetric
  const float* inverse;   // [E, K] of the diagonal
  const float* scale;     // [E, N, num_blocks]
  const float* zero;      // the same, or null
  float* objective;       // [E, N] errors H errors
  int64_t num_rows, num_columns, num_blocks, block, sweeps;
  float least_gain;       // of the objective; a row whose sweep gains less is done
  Element element;
};
void descend_rows(const DescentTask& task, int64_t begin, int64_t end);  // rows, all experts' in a row

// What codes, or the nearest values where there are none, leave of weights [R, K]; `steps` are these values unscaled.
struct LeftTask {
  const float* weights;
  const uint8_t* codes;  // or null
  const float* scale;    // [R, num_blocks]
  const float* zero;     // the same, or null
  float *errors, *steps;
  int64_t num_columns, num_blocks, block;
  Element element;
};
void left_rows(const LeftTask& task, int64_t begin, int64_t end);

// The candidate scale of least weighted squared error, for runs of `block` weights.
struct ScaleTask {
  const float* values;      // [R, padded], zeros behind a ragged end
  const float* importance;  // [P, padded], run r takes row r % P
  const float* scale;       // [C, R]
  const float* zero;        // the same, or null
  int64_t* best;            // [R] out: the first one among equals
  int64_t num_runs, num_weights, num_candidates, padded;
  bool to_bf16;             // errors are of values as bf16 holds them
  bool both_signs;          // each candidate with a negative scale too: index num_candidates on
  Element element;
};
void best_scales(const ScaleTask& task, int64_t begin, int64_t end);
