// A packed weight matrix as the kernels see it, and what they do with one. No torch in here.
//
// Layout (see packing.py): a row is planes of 4, 2, 1 or 8 bits; byte j of a 16-byte slab holds elements
// j, j + 16, j + 32, ... . All decoders work on 64 elements at a time and yield them in two vectors,
//   first  = elements 0..15 and 32..47,   second = elements 16..31 and 48..63,
// which is the order in which slabs come apart with shifts only. Activations are brought into the same
// order once per call. Every element of at most 8 bits is exact in bf16, so products are exact in float32.
#pragma once
#include <cstdint>
#include <vector>

#if defined(__x86_64__)  // the loader picks the clone for the processor at hand
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
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

constexpr int64_t kSuper = 64;
inline int64_t supers(int64_t columns) { return (columns + kSuper - 1) / kSuper; }

INLINE float as_float(uint32_t bits) { float f; __builtin_memcpy(&f, &bits, 4); return f; }
INLINE uint32_t as_bits(float f) { uint32_t bits; __builtin_memcpy(&bits, &f, 4); return bits; }
inline uint16_t to_bf16(float f) {  // nearest even; never called with NaN
  uint32_t bits = as_bits(f);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The value of every code (an asymmetric integer's is the code itself), as bf16.
const uint16_t* value_table(const Packed& w);
// float32 scales of one row, one per 32 elements (per 16 for blocks of 16), zero-padded to whole supers.
void row_scales(const Packed& w, int64_t row, float* out);
constexpr int64_t kSlack = 8;  // floats that a ragged last block may write past the supers
inline int64_t scale_step(const Packed& w) { return w.block == 16 ? 16 : 32; }

// y[m, n0..n1) = sum_k x[m, k] w[n, k]. `x` holds `columns` = supers(K) * 64 values a row, zero-padded, in decoder order.
struct Activations {
  const uint16_t* bf16;  // for avx512_bf16
  const float* f32;      // for the portable kernel, same order
  const float* block_sums;  // [M, num_blocks], only for asymmetric weights
  int64_t num_rows, columns;
};
void linear_rows(const Packed& w, const Activations& x, float* y, int64_t ldy, int64_t n0, int64_t n1);
// Dequantized rows n0..n1, [n1 - n0, K]: bf16 with AVX-512 BF16 only, float32 everywhere.
void dequantize_rows(const Packed& w, uint16_t* out, int64_t n0, int64_t n1);
void dequantize_rows(const Packed& w, float* out, int64_t n0, int64_t n1);
bool has_avx512_bf16();

// Round-to-nearest of `rows` rows of K weights to an MX format: codes in the memory layout and E8M0 bytes.
struct MxTask {
  const void* weight;
  int dtype;  // 0 float32, 1 bf16, 2 fp16
  uint8_t* codes;
  uint8_t* scale;
  int64_t num_columns, row_bytes;
  int bits, mantissa_bits, exponent_bias;
  float largest;
  int rule;  // 0 floor, 1 even, 2 rceil
};
void quantize_mx_rows(const MxTask& task, int64_t n0, int64_t n1);
