// The torch side of GPTQ's ops: checks, threads and registration. `spec` is as in register.cpp.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "packed.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Spec = at::IntArrayRef;

namespace {

const Tensor* present(const OptionalTensor& t) { return t && t->defined() && t->numel() ? &*t : nullptr; }

Element element_of(Spec spec, double largest) { return {int(spec[0]), int(spec[1]), int(spec[2]), float(largest)}; }

void round_columns_leaf(const Tensor& values, const Tensor& weights, const Tensor& errors, const Tensor& nearest,
                        const Tensor& codes, const Tensor& ratios, const Tensor& scale, const OptionalTensor& zero,
                        const OptionalTensor& blocks, const Tensor& penalties, const Tensor& shares,
                        const Tensor& bounds, Spec spec, double largest, int64_t low, int64_t high) {
  for (const Tensor* x : {&values, &weights, &errors, &nearest, &scale})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kFloat && x->dim() == 3, "aqtx: float32 [E, K, N] only");
  TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == at::kByte, "aqtx: codes in uint8");
  TORCH_CHECK(ratios.scalar_type() == at::kFloat && ratios.dim() == 3, "aqtx: float32 [E, K, K] only");
  const Tensor *zeros = present(zero), *order = present(blocks);
  TORCH_CHECK(!zeros || (zeros->is_contiguous() && zeros->scalar_type() == at::kFloat), "aqtx: zero points in float32");
  TORCH_CHECK(!order || (order->is_contiguous() && order->scalar_type() == at::kLong), "aqtx: block numbers in int64");
  for (const Tensor* x : {&penalties, &shares, &bounds})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kFloat, "aqtx: bounds in float32");
  const ColumnsTask task{values.const_data_ptr<float>(), weights.const_data_ptr<float>(), errors.data_ptr<float>(),
                         nearest.data_ptr<float>(), codes.data_ptr<uint8_t>(), ratios.const_data_ptr<float>(),
                         ratios.strides().data(), scale.const_data_ptr<float>(),
                         zeros ? zeros->const_data_ptr<float>() : nullptr,
                         order ? order->const_data_ptr<int64_t>() : nullptr,
                         penalties.const_data_ptr<float>(), shares.const_data_ptr<float>(), bounds.data_ptr<float>(),
                         values.size(2), values.size(1), scale.size(1), spec[4], low, high, element_of(spec, largest)};
  at::parallel_for(0, values.size(0) * column_tiles(values.size(2)), 4,
                   [&](int64_t a, int64_t b) { round_columns(task, a, b); });
}

void sweep_columns_leaf(const Tensor& gradient, const Tensor& weights, const Tensor& errors, const Tensor& moved,
                        const Tensor& codes, const Tensor& hessian, const Tensor& inverse, const Tensor& scale,
                        const OptionalTensor& zero, Spec spec, double largest, int64_t low, int64_t high) {
  const Tensor* zeros = present(zero);
  for (const Tensor* x : {&gradient, &weights, &errors, &moved, &scale, &hessian, zeros ? zeros : &scale})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kFloat && x->dim() == 3, "aqtx: float32 [E, ., .] only");
  TORCH_CHECK(codes.is_contiguous() && codes.scalar_type() == at::kByte, "aqtx: codes in uint8");
  TORCH_CHECK(inverse.is_contiguous() && inverse.scalar_type() == at::kFloat, "aqtx: the diagonal's inverse in float32");
  const SweepTask task{gradient.data_ptr<float>(), weights.const_data_ptr<float>(), errors.data_ptr<float>(),
                       moved.data_ptr<float>(), codes.data_ptr<uint8_t>(), hessian.const_data_ptr<float>(),
                       inverse.const_data_ptr<float>(), scale.const_data_ptr<float>(),
                       zeros ? zeros->const_data_ptr<float>() : nullptr, weights.size(2), weights.size(1),
                       scale.size(1), spec[4], low, high, element_of(spec, largest)};
  at::parallel_for(0, weights.size(0) * column_tiles(weights.size(2)), 4,
                   [&](int64_t a, int64_t b) { sweep_columns(task, a, b); });
}

Tensor best_scales_of(const Tensor& values, const Tensor& importance, const Tensor& scale, const OptionalTensor& zero,
                      Spec spec, double largest, bool to_bf16) {
  const Tensor* zeros = present(zero);
  for (const Tensor* x : {&values, &importance, &scale, zeros ? zeros : &scale})
    TORCH_CHECK(x->is_contiguous() && x->scalar_type() == at::kFloat && x->dim() == 2, "aqtx: float32 matrices only");
  TORCH_CHECK(values.size(1) % 16 == 0 && importance.size(1) == values.size(1), "aqtx: runs in multiples of 16");
  const Tensor best = at::empty({values.size(0)}, values.options().dtype(at::kLong));
  const ScaleTask task{values.const_data_ptr<float>(), importance.const_data_ptr<float>(),
                       scale.const_data_ptr<float>(), zeros ? zeros->const_data_ptr<float>() : nullptr,
                       best.data_ptr<int64_t>(), values.size(0), importance.size(0), scale.size(0), values.size(1),
                       to_bf16, element_of(spec, largest)};
  at::parallel_for(0, values.size(0), 64, [&](int64_t a, int64_t b) { best_scales(task, a, b); });
  return best;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aqtx_cpu, m) {
  m.def("round_columns(Tensor values, Tensor weights, Tensor(a!) errors, Tensor(b!) nearest, Tensor(c!) codes, Tensor ratios, Tensor scale, Tensor? zero, Tensor? blocks, Tensor penalties, Tensor shares, Tensor(d!) bounds, int[] spec, float largest, int low, int high) -> ()");
  m.def("sweep_columns(Tensor(a!) gradient, Tensor weights, Tensor(b!) errors, Tensor(c!) moved, Tensor(d!) codes, Tensor hessian, Tensor inverse, Tensor scale, Tensor? zero, int[] spec, float largest, int low, int high) -> ()");
  m.def("best_scales(Tensor values, Tensor importance, Tensor scale, Tensor? zero, int[] spec, float largest, bool to_bf16) -> Tensor");
}
TORCH_LIBRARY_IMPL(aqtx_cpu, CPU, m) {
  m.impl("round_columns", round_columns_leaf);
  m.impl("sweep_columns", sweep_columns_leaf);
  m.impl("best_scales", best_scales_of);
}
