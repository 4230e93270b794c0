// What the ops on linears and on experts share: weights as kernels take them, activations made ready, and products of
// few rows and of many. Nothing here is checked but where it says so.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "checks.h"
#include "rounded.h"

// Matrix `expert` of a stack, or the matrix itself (0); checked.
Packed describe(const at::Tensor& codes, const at::Tensor& scale, const at::Tensor* zero, const at::Tensor* per_tensor,
                Spec spec, int64_t num_columns, int64_t expert);

// Contiguous activations [count, K] of any float type.
struct Rows {
  const char* data;
  at::ScalarType type;
  int64_t count;
};
Rows rows_of(const at::Tensor& x, int64_t start, int64_t count);
std::vector<float> as_floats(const Rows& x, int64_t columns);

// Whether the processor multiplies this type itself, and how many rows are few.
bool is_fast(at::ScalarType type);
bool is_few(at::ScalarType type, int64_t count);
// What is multiplied after dequantizing: 16 bits where the processor has products of them, else float32, which is faster.
at::ScalarType dense_type(at::ScalarType type);

// Few rows of activations, made ready for the matrices of one format: integers, or values in decoder order.
struct Inputs {
  Rounded whole;
  at::Tensor values;
  std::vector<float> sums;
  Activations view;
  bool is_rounded;
};
Inputs inputs_of(const Rows& x, const Packed& w, at::ScalarType model);  // x is of the model's type or float32
// y[m, a..b) of [M, N] floats, for rows a..b of the matrix.
void product_rows(const Packed& w, const Inputs& x, float* y, int64_t N, int64_t a, int64_t b);

int64_t grain(const Packed& w);  // rows that are worth a thread
void few_rows(const Rows& x, const Packed& w, int64_t N, void* y);  // y [M, N] = x w^T in x's type
at::Tensor many_rows(const at::Tensor& x, const Packed& w, int64_t N);
at::Tensor dequantized(const Packed& w, int64_t N, const at::TensorOptions& options);

// Experts of one format, and a stack of them in several; `slots[e]` is expert e's place in all buckets together.
struct Bucket {
  at::Tensor codes, scale, zero, per_tensor;  // plain experts are all codes
  Spec spec;
  bool is_packed() const { return spec[0] != kPlain; }
  Packed matrix(int64_t index, int64_t num_columns) const;  // checked
};
struct Stack {
  std::vector<Bucket> buckets;
  at::IntArrayRef slots;
  int64_t num_outputs;
  std::pair<const Bucket*, int64_t> find(int64_t expert) const;  // its bucket and its place there, checked
};
int64_t num_parts(at::IntArrayRef specs);
// `parts` lists the buckets' tensors: codes (or the plain weights), scale, and what each spec says it has.
Stack stack_of(at::TensorList parts, at::IntArrayRef specs, at::IntArrayRef slots, int64_t num_outputs);
