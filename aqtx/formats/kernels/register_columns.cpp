// The torch side of GPTQ's ops: checks, threads and registration. `spec` is as in register.cpp.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

const Tensor* present(const OptionalTensor& t) { return t && t->defined() ? &*t : nullptr; }
const float* floats(const Tensor* t) { return t ? t->const_data_ptr<float>() : nullptr; }

Element element_of(Spec spec, double largest) { return {int(spec[0]), int(spec[1]), int(spec[2]), float(largest)}; }

void round_columns_leaf(const Tensor& values, const Tensor& weights, const Tensor& errors, const Tensor& codes,
                        const Tensor& ratios, const Tensor& scale, const OptionalTensor& zero,
                        const OptionalTensor& blocks, const Tensor& penalties, const Tensor& bounds, Spec spec,
                        double largest, int64_t low, int64_t high) {
  const Tensor *zeros = present(zero), *order = present(blocks);
  check_columns({values, weights, errors, codes, ratios, penalties, bounds, order}, {scale, zeros}, spec, low, high);
  const ColumnsTask task{values.const_data_ptr<float>(), weights.const_data_ptr<float>(), errors.data_ptr<float>(),
                         codes.data_ptr<uint8_t>(), ratios.const_data_ptr<float>(), scale.const_data_ptr<float>(),
                         floats(zeros), order ? order->const_data_ptr<int64_t>() : nullptr,
                         penalties.const_data_ptr<float>(), bounds.data_ptr<float>(), values.size(2), values.size(1),
                         scale.size(1), spec[4], low, high, element_of(spec, largest)};
  at::parallel_for(0, values.size(0) * column_tiles(values.size(2)), 4,
                   [&](int64_t a, int64_t b) { round_columns(task, a, b); });
}

void descend(const Tensor& gradient, const Tensor& weights, const Tensor& errors, const Tensor& codes,
             const Tensor& hessian, const Tensor& inverse, const Tensor& scale, const OptionalTensor& zero,
             const Tensor& objective, Spec spec, double largest, int64_t sweeps, double least_gain) {
  const Tensor* zeros = present(zero);
  check_descent({gradient, weights, errors, codes, hessian, inverse, objective}, {scale, zeros}, spec);
  const DescentTask task{gradient.const_data_ptr<float>(), weights.const_data_ptr<float>(), errors.data_ptr<float>(),
                         codes.data_ptr<uint8_t>(), hessian.const_data_ptr<float>(), inverse.const_data_ptr<float>(),
                         scale.const_data_ptr<float>(), floats(zeros), objective.data_ptr<float>(), weights.size(1),
                         weights.size(2), scale.size(2), spec[4], sweeps, float(least_gain),
                         element_of(spec, largest)};
  at::parallel_for(0, weights.size(0) * weights.size(1), 16, [&](int64_t a, int64_t b) { descend_rows(task, a, b); });
}

std::tuple<Tensor, Tensor> left_by(const Tensor& weights, const OptionalTensor& codes, const Tensor& scale,
                                   const OptionalTensor& zero, Spec spec, double largest) {
  const Tensor *zeros = present(zero), *given = present(codes);
  check_left(weights, given, {scale, zeros}, spec);
  const Tensor errors = at::empty_like(weights), steps = at::empty_like(weights);
  const LeftTask task{weights.const_data_ptr<float>(), given ? given->const_data_ptr<uint8_t>() : nullptr,
                      scale.const_data_ptr<float>(), floats(zeros), errors.data_ptr<float>(), steps.data_ptr<float>(),
                      weights.size(2), scale.size(2), spec[4], element_of(spec, largest)};
  at::parallel_for(0, weights.size(0) * weights.size(1), 16, [&](int64_t a, int64_t b) { left_rows(task, a, b); });
  return {errors, steps};
}

Tensor best_scales_of(const Tensor& values, const Tensor& importance, const Tensor& scale, const OptionalTensor& zero,
                      Spec spec, double largest, bool to_bf16, bool both_signs) {
  const Tensor* zeros = present(zero);
  check_runs(values, importance, {scale, zeros}, spec);
  TORCH_CHECK(!both_signs || (!zeros && spec[1] == 0), "aqtx: both signs of symmetric integers only");
  const Tensor best = at::empty({values.size(0)}, values.options().dtype(at::kLong));
  const ScaleTask task{values.const_data_ptr<float>(), importance.const_data_ptr<float>(),
                       scale.const_data_ptr<float>(), floats(zeros), best.data_ptr<int64_t>(), values.size(0),
                       importance.size(0), scale.size(0), values.size(1), to_bf16, both_signs, element_of(spec, largest)};
  at::parallel_for(0, values.size(0), 64, [&](int64_t a, int64_t b) { best_scales(task, a, b); });
  return best;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(aqtx_cpu, m) {
  m.def("round_columns(Tensor values, Tensor weights, Tensor(a!) errors, Tensor(b!) codes, Tensor ratios, Tensor scale, Tensor? zero, Tensor? blocks, Tensor penalties, Tensor(c!) bounds, int[] spec, float largest, int low, int high) -> ()");
  m.def("descend(Tensor gradient, Tensor weights, Tensor(a!) errors, Tensor(b!) codes, Tensor hessian, Tensor inverse, Tensor scale, Tensor? zero, Tensor(c!) objective, int[] spec, float largest, int sweeps, float least_gain) -> ()");
  m.def("left_by(Tensor weights, Tensor? codes, Tensor scale, Tensor? zero, int[] spec, float largest) -> (Tensor, Tensor)");
  m.def("best_scales(Tensor values, Tensor importance, Tensor scale, Tensor? zero, int[] spec, float largest, bool to_bf16, bool both_signs) -> Tensor");
}
TORCH_LIBRARY_IMPL(aqtx_cpu, CPU, m) {
  m.impl("round_columns", round_columns_leaf);
  m.impl("descend", descend);
  m.impl("left_by", left_by);
  m.impl("best_scales", best_scales_of);
}
