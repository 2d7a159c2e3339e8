// The launch of cuda/launch.cuh for a CPU: one cluster after another, each on fibres.
#pragma once

#include <tuple>

#include "counters.h"
#include "fibres.h"

namespace eopd::cuda {

template <typename... Parameters, typename... Arguments>
void launch(const std::string& name, void (*kernel)(Parameters...), const Shape& shape, const Place&,
            const Arguments&... arguments) {
  static emulation::Cluster cluster;
  if (shape.threads % emulation::warp_size != 0 || shape.threads > 1024)
    throw std::runtime_error(name + ": a CTA has whole warps and up to 1,024 threads, got " +
                             std::to_string(shape.threads));
  ++emulation::counters().launches;
  const std::tuple<std::decay_t<Parameters>...> given{arguments...};
  const std::function<void()> body = [&] { std::apply(kernel, given); };
  for (int index = 0; index < shape.clusters; ++index)
    cluster.run(index, shape.cluster, shape.threads, shape.shared_bytes,
                emulation::settings().seed + index, body);
}

}  // namespace eopd::cuda
