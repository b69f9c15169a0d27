// Operator of kernels/adamw.py.
#include <cmath>

#include "operators.h"
#include "tensors.h"

namespace peftdyno {

namespace {

// [R, size]; the runs of a group of parameters lie apart where a bank has several groups.
Tensor by_run(const Tensor& t, const Tensor& p) {
  TORCH_CHECK(t.scalar_type() == at::kFloat && t.sizes() == p.sizes(), "AdamW takes fp32 tensors of one shape");
  const Tensor runs = t.view({t.size(0), t.numel() / t.size(0)});
  TORCH_CHECK(runs.stride(1) == 1 || runs.size(1) == 1, "a run's parameters are contiguous");
  return runs;
}

}  // namespace

void adamw_(Tensor& p_any, const Tensor& g_any, Tensor& m_any, Tensor& v_any, at::ArrayRef<double> rates,
            at::ArrayRef<double> clips, IntArrayRef steps, double beta1, double beta2, double eps, double decay) {
  if (p_any.numel() == 0) return;
  const Tensor p = by_run(p_any, p_any), g = by_run(g_any, p_any), m = by_run(m_any, p_any), v = by_run(v_any, p_any);
  TORCH_CHECK(rates.size() == steps.size() && clips.size() == steps.size() &&
                  p.size(0) == static_cast<int64_t>(steps.size()),
              "AdamW takes a rate, a clip factor and a step for each run");
  for (int64_t j = 0; j < p.size(0); ++j) {
    if (steps[j] == 0) continue;
    const double correction1 = 1 - std::pow(beta1, steps[j]), correction2 = 1 - std::pow(beta2, steps[j]);
    AdamW task{p.data_ptr<float>() + j * p.stride(0),
               m.data_ptr<float>() + j * m.stride(0),
               v.data_ptr<float>() + j * v.stride(0),
               g.data_ptr<float>() + j * g.stride(0),
               static_cast<float>(clips[j]),
               static_cast<float>(beta1),
               static_cast<float>(beta2),
               static_cast<float>(1 - beta1),
               static_cast<float>(1 - beta2),
               static_cast<float>(rates[j] / correction1),
               static_cast<float>(1 / std::sqrt(correction2)),
               static_cast<float>(eps),
               static_cast<float>(1 - rates[j] * decay)};
    at::parallel_for(0, p.size(1), 8192, [&](int64_t begin, int64_t end) { kernels().adamw(task, begin, end); });
  }
}

}  // namespace peftdyno
