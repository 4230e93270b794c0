// Products of few rows and of many with packed matrices; see products.h.
#include "products.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <numeric>

using at::Tensor;

Packed describe(const Tensor& codes, const Tensor& scale, const Tensor* zero, const Tensor* per_tensor, Spec spec,
                int64_t num_columns, int64_t expert) {
  check_packed(codes, scale, zero, per_tensor, spec, num_columns);
  TORCH_CHECK(0 <= expert && expert < (codes.dim() == 3 ? codes.size(0) : 1), "aqtx: no expert ", expert);
  const int64_t rows = codes.size(-2), blocks = scale.size(-1), row_bytes = codes.size(-1);
  Packed w{};
  w.codes = codes.const_data_ptr<uint8_t>() + expert * rows * row_bytes;
  w.scale = (const uint8_t*)scale.const_data_ptr() + expert * rows * blocks * scale.element_size();
  w.zero = zero ? zero->const_data_ptr<uint8_t>() + expert * rows * blocks : nullptr;
  w.per_tensor = per_tensor ? per_tensor->const_data_ptr<float>()[expert] : 1.0f;
  w.bits = int(spec[0]), w.mantissa_bits = int(spec[1]), w.exponent_bias = int(spec[2]);
  w.scale_kind = ScaleKind(spec[3]);
  w.num_columns = num_columns, w.block = spec[4], w.num_blocks = blocks, w.row_bytes = row_bytes;
  return w;
}

Rows rows_of(const Tensor& x, int64_t start, int64_t count) {
  return {(const char*)x.const_data_ptr() + start * x.size(-1) * x.element_size(), x.scalar_type(), count};
}

std::vector<float> as_floats(const Rows& x, int64_t columns) {
  std::vector<float> values(x.count * columns);
  auto copy = [&](auto* from) { std::copy(from, from + values.size(), values.begin()); };
  if (x.type == at::kFloat) copy((const float*)x.data);
  else if (x.type == at::kBFloat16) copy((const at::BFloat16*)x.data);
  else if (x.type == at::kHalf) copy((const at::Half*)x.data);
  else TORCH_CHECK(false, "aqtx: activations must be float32, bfloat16 or float16");
  return values;
}

bool is_fast(at::ScalarType type) { return cpu() == Cpu::avx512_bf16 && type == at::kBFloat16; }

Inputs inputs_of(const Rows& x, const Packed& w, at::ScalarType model) {
  Inputs p;
  const bool fast = is_fast(model);
  p.is_rounded = !fast && model != at::kFloat && can_round(w) &&
                 round_activations(as_floats(x, w.num_columns).data(), x.count, w, 16, p.whole);
  if (p.is_rounded) return p;
  const int64_t M = x.count, K = w.num_columns, columns = ordered_columns(w, fast);
  const bool as_is = fast && x.type == at::kBFloat16;
  const std::vector<float> floats = as_is && !w.zero ? std::vector<float>() : as_floats(x, K);
  p.values = at::detail::empty_cpu({M, columns}, fast ? at::kBFloat16 : at::kFloat);
  p.view = {nullptr, nullptr, nullptr, M, columns};
  if (fast) {
    std::vector<uint16_t> narrow(as_is ? 0 : M * K);
    round_to_bf16(floats.data(), narrow.size(), narrow.data());
    order_activations(as_is ? (const uint16_t*)x.data : narrow.data(), M, w, (uint16_t*)p.values.data_ptr());
    p.view.bf16 = (const uint16_t*)p.values.const_data_ptr();
  } else {
    order_activations(floats.data(), M, w, p.values.data_ptr<float>());
    p.view.f32 = p.values.const_data_ptr<float>();
  }
  if (w.zero) {
    p.sums.resize(M * w.num_blocks);
    for (int64_t m = 0; m < M; m++)
      for (int64_t b = 0; b < w.num_blocks; b++) {
        const float* from = floats.data() + m * K + b * w.block;
        p.sums[m * w.num_blocks + b] = std::accumulate(from, from + std::min(w.block, K - b * w.block), 0.0f);
      }
    p.view.block_sums = p.sums.data();
  }
  return p;
}

void product_rows(const Packed& w, const Inputs& x, float* y, int64_t N, int64_t a, int64_t b) {
  if (x.is_rounded) rounded_rows(w, x.whole, y, N, a, b);
  else linear_rows(w, x.view, y, N, a, b);
}

int64_t grain(const Packed& w) { return std::max<int64_t>(16, (1 << 18) / std::max<int64_t>(w.num_columns, 1)); }

// y [M, N] = x [M, K] w^T for few rows, in x's type.
void few_rows(const Rows& x, const Packed& w, int64_t N, void* y) {
  const Inputs ready = inputs_of(x, w, x.type);
  const std::unique_ptr<float[]> scratch(x.type == at::kFloat ? nullptr : new float[x.count * N]);
  float* sums = scratch ? scratch.get() : (float*)y;
  at::parallel_for(0, N, grain(w), [&](int64_t a, int64_t b) {
    product_rows(w, ready, sums, N, a, b);
    for (int64_t m = 0; m < x.count; m++) {
      const float* from = sums + m * N;
      if (x.type == at::kBFloat16) round_to_bf16(from + a, b - a, (uint16_t*)y + m * N + a);
      else if (x.type == at::kHalf) std::copy(from + a, from + b, (at::Half*)y + m * N + a);
    }
  });
}

// Rows start..start + out.size(0) of a weight into `out`, bf16 or float32; none of it beyond `largest`.
static void dequantize_into(const Tensor& out, const Packed& w, int64_t start, float largest) {
  at::parallel_for(0, out.size(0), grain(w), [&](int64_t a, int64_t b) {
    if (out.scalar_type() == at::kFloat)
      dequantize_rows(w, out.data_ptr<float>() + a * w.num_columns, start + a, start + b, largest);
    else dequantize_rows(w, (uint16_t*)out.data_ptr() + a * w.num_columns, start + a, start + b);
  });
}

static float largest_of(at::ScalarType type) { return type == at::kHalf ? 65504.0f : type == at::kBFloat16 ? kLargestBf16 : kLargestFloat; }

Tensor dequantized(const Packed& w, int64_t N, const at::TensorOptions& options) {
  const at::ScalarType type = options.dtype().toScalarType();
  const Tensor out = at::empty({N, w.num_columns}, options.dtype(is_fast(type) ? type : at::kFloat));
  dequantize_into(out, w, 0, largest_of(type));
  return out.to(type);
}

// Few rows: one fused pass over the packed weight. Many: dequantize and multiply, in panels that stay in the
// cache and are small enough for the allocator to keep: fresh pages for a whole weight cost a third of the product.
static constexpr int64_t kFewRows = 32, kFewPortable = 8, kPanel = 1 << 19;

bool is_few(at::ScalarType type, int64_t count) { return count <= (is_fast(type) ? kFewRows : kFewPortable); }

at::ScalarType dense_type(at::ScalarType type) { return is_fast(type) ? type : at::kFloat; }

Tensor many_rows(const Tensor& x, const Packed& w, int64_t N) {
  const int64_t step = std::max<int64_t>(64, kPanel / std::max<int64_t>(w.num_columns, 1));
  const Tensor rows = x.to(dense_type(x.scalar_type()));
  if (N <= step) return at::linear(rows, dequantized(w, N, rows.options())).to(x.scalar_type());
  auto shape = x.sizes().vec();
  shape.back() = N;
  const Tensor y = at::detail::empty_cpu(shape, x.scalar_type()), space = at::empty({step, w.num_columns}, rows.options());
  for (int64_t n = 0; n < N; n += step) {
    const Tensor panel = space.narrow(0, 0, std::min(step, N - n));
    dequantize_into(panel, w, n, largest_of(rows.scalar_type()));
    y.narrow(-1, n, panel.size(0)).copy_(at::linear(rows, panel));
  }
  return y;
}

int64_t num_parts(at::IntArrayRef specs) {
  int64_t wanted = 0;
  TORCH_CHECK(specs.size() % kSpecLength == 0, "aqtx: a format takes ", kSpecLength, " numbers");
  for (size_t at = 0; at < specs.size(); at += kSpecLength)
    wanted += 1 + (specs[at] != kPlain) + (specs[at + 5] != 0) + (specs[at + 6] != 0);
  return wanted;
}

Stack stack_of(at::TensorList parts, at::IntArrayRef specs, at::IntArrayRef slots, int64_t num_outputs) {
  Stack found{{}, slots, num_outputs};
  const size_t wanted = size_t(num_parts(specs));
  size_t next = 0;
  TORCH_CHECK(parts.size() == wanted, "aqtx: the formats have ", wanted, " parts, not ", parts.size());
  for (size_t at = 0; at < specs.size(); at += kSpecLength) {
    Bucket b;
    b.spec = specs.slice(at, kSpecLength);
    b.codes = parts[next++];
    if (b.spec[0] != kPlain) b.scale = parts[next++];
    if (b.spec[5]) b.zero = parts[next++];
    if (b.spec[6]) b.per_tensor = parts[next++];
    TORCH_CHECK(b.codes.dim() == 3 && b.codes.size(1) == num_outputs, "aqtx: experts must be [E, ", num_outputs, ", ..]");
    found.buckets.push_back(b);
  }
  return found;
}

std::pair<const Bucket*, int64_t> Stack::find(int64_t expert) const {
  int64_t slot = slots[expert];
  const Bucket *b = buckets.data(), *last = b + buckets.size();
  while (b < last && slot >= b->codes.size(0)) slot -= (b++)->codes.size(0);
  TORCH_CHECK(slot >= 0 && b < last, "aqtx: expert ", expert, " has slot ", slots[expert], ", beyond the stack");
  return {b, slot};
}

Packed Bucket::matrix(int64_t index, int64_t num_columns) const {
  return describe(codes, scale, zero.defined() ? &zero : nullptr, per_tensor.defined() ? &per_tensor : nullptr, spec,
                  num_columns, index);
}
