// Operator of kernels/adamw.py.
#include <cmath>

#include "operators.h"
#include "tensors.h"

namespace peftdyno {

void adamw_(Tensor& p, const Tensor& g_any, Tensor& m, Tensor& v, at::ArrayRef<double> rates,
            at::ArrayRef<double> clips, IntArrayRef steps, double beta1, double beta2, double eps, double decay) {
  const Tensor g = g_any.contiguous();
  for (const Tensor& t : {p, m, v, g})
    TORCH_CHECK(t.is_contiguous() && t.scalar_type() == at::kFloat && t.sizes() == p.sizes(),
                "AdamW takes contiguous fp32 tensors of one shape");
  TORCH_CHECK(rates.size() == steps.size() && clips.size() == steps.size() &&
                  p.size(0) == static_cast<int64_t>(steps.size()),
              "AdamW takes a rate, a clip factor and a step for each run");
  const int64_t runs = p.size(0), size = runs == 0 ? 0 : p.numel() / runs;
  for (int64_t j = 0; j < runs; ++j) {
    if (steps[j] == 0) continue;
    const double correction1 = 1 - std::pow(beta1, steps[j]), correction2 = 1 - std::pow(beta2, steps[j]);
    AdamW task{p.data_ptr<float>() + j * size,
               m.data_ptr<float>() + j * size,
               v.data_ptr<float>() + j * size,
               g.data_ptr<float>() + j * size,
               static_cast<float>(clips[j]),
               static_cast<float>(beta1),
               static_cast<float>(beta2),
               static_cast<float>(1 - beta1),
               static_cast<float>(1 - beta2),
               static_cast<float>(rates[j] / correction1),
               static_cast<float>(1 / std::sqrt(correction2)),
               static_cast<float>(eps),
               static_cast<float>(1 - rates[j] * decay)};
    at::parallel_for(0, size, 8192, [&](int64_t begin, int64_t end) { kernels().adamw(task, begin, end); });
  }
}

}  // namespace peftdyno
