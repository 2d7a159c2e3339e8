// The launchers of one pair of widths: EOPD_STUDENT and EOPD_TEACHER name the types of storage.cuh, EOPD_LAUNCHERS the
// table. A pair is an object of its own, launchers_*.cu, so that the build is parallel.
#include <string>

#include "kernels.cuh"
#include "launch.cuh"
#include "mixture_kernels.cuh"

namespace eopd::cuda {
namespace {

using Pair = Sides<EOPD_STUDENT, EOPD_TEACHER>;
using Real = Pair::Real;
constexpr int64_t scratch_bytes = sizeof(Merge<RowInBits<Real>>::Scratch);

// A transform in the factors that it takes per logit.
LogitTransform<Real> factors_of(const Transform& transform) {
  const bool softcap = transform.softcap != 0;
  const double width = softcap ? transform.softcap : transform.temperature;
  const double inner = transform.scale / width;
  return {Real(inner), Real(transform.softcap / transform.temperature), softcap, !softcap && Real(inner) == 1};
}

Block<Real> block_of(const Task& task) {
  if (task.columns > 1 << 30)  // a column's index is an int, and its distance in bytes computed from it
    throw std::invalid_argument("a row may have 2^30 columns, got " + std::to_string(task.columns));
  if (task.rows > (1 << 30) / task.plan.cluster)  // each has its cluster, and a grid 2^31 CTAs
    throw std::invalid_argument("a block may have 2^30 / " + std::to_string(task.plan.cluster) + " rows, got " +
                                std::to_string(task.rows));
  if (task.out.dtype == DType::float64 && !std::is_same_v<Real, double>)
    throw std::invalid_argument("a gradient in float64 wants a side in float64");
  const Transform& student = task.student_transform;
  const bool softcap = student.softcap != 0;
  const Slope<Real> slope{Real(student.scale / student.temperature),
                          Real(softcap ? student.temperature / student.softcap : 0), softcap};
  return {task.student, task.teacher, task.out, {factors_of(student), factors_of(task.teacher_transform)}, slope,
          int(task.rows), int(task.columns)};
}

Shape shape_of(const Task& task, int64_t bytes) {
  return {int(task.rows), task.plan.cluster, task.plan.threads, bytes};
}

template <Kept kept>
int64_t bytes_of_row(const Task& task) {
  return OnChip<Pair, kept>::shared_bytes(int(task.columns), task.plan.cluster, task.plan.threads);
}

void row_statistics(const Task& task, Address statistics) {
  launch("row_statistics", row_statistics_kernel<Pair>,
         shape_of(task, scratch_bytes + bytes_of_row<Kept::nothing>(task)), task.place, block_of(task),
         at<Real>(statistics));
}

void row_gradient(const Task& task, Address statistics, Address a, Address b, Address c) {
  launch("row_gradient", row_gradient_kernel<Pair>, shape_of(task, bytes_of_row<Kept::nothing>(task)), task.place,
         block_of(task), at<const Real>(statistics), at<const Real>(a), at<const Real>(b), at<const Real>(c));
}

void row_mixture(const Task& task, Address statistics, const std::array<double, 2>& skews, Address mixture) {
  const int64_t bytes = sizeof(Merge<MixtureStatistics<Real>>::Scratch) + bytes_of_row<Kept::nothing>(task);
  launch("row_mixture", row_mixture_kernel<Pair>, shape_of(task, bytes), task.place, block_of(task),
         at<const Real>(statistics), skews_of<Real>(skews), at<Real>(mixture));
}

void row_mixture_gradient(const Task& task, Address statistics, Address a, Address b, Address c,
                          const std::array<double, 2>& skews) {
  launch("row_mixture_gradient", row_mixture_gradient_kernel<Pair>, shape_of(task, bytes_of_row<Kept::nothing>(task)),
         task.place, block_of(task), at<const Real>(statistics), at<const Real>(a), at<const Real>(b),
         at<const Real>(c), skews_of<Real>(skews));
}

// Calls function(Kept) with the place where the plan keeps a row, and refuses one that these widths do not have. One
// column at a time is not worth keeping: see AnyBits.
template <typename Function>
auto with_kept(const Task& task, Function function) {
  const Plan& plan = task.plan;
  if constexpr (Slice<Pair>::in_groups) {
    const int64_t room = int64_t(OnChip<Pair, Kept::registers>::most) * plan.threads;
    const int64_t groups = most_groups<Pair>(int(task.columns), plan.cluster);
    if (plan.kept == int(Kept::registers) && groups > room)
      throw std::invalid_argument("registers hold " + std::to_string(room) + " groups of a CTA, got " +
                                  std::to_string(groups));
    if (plan.kept == int(Kept::shared)) return function(std::integral_constant<Kept, Kept::shared>{});
    if (plan.kept == int(Kept::registers)) return function(std::integral_constant<Kept, Kept::registers>{});
  }
  if (plan.kept != int(Kept::nothing))
    throw std::invalid_argument("these dtypes cannot be kept as " + std::to_string(plan.kept));
  return function(std::integral_constant<Kept, Kept::nothing>{});
}

int64_t shared_bytes(const Task& task) {
  return with_kept(task, [&](auto kept) { return scratch_bytes + bytes_of_row<kept.value>(task); });
}

void row_loss_and_gradient(const Task& task, Address weights, double gate_threshold,
                           const std::array<double, 4>& combine, Address statistics, Address gate, Address loss) {
  const auto kernel = with_kept(task, [](auto kept) { return &row_loss_and_gradient_kernel<Pair, kept.value>; });
  launch("row_loss_and_gradient", kernel, shape_of(task, shared_bytes(task)), task.place, block_of(task),
         at<const Real>(weights), Gate<Real>{Real(gate_threshold)}, combine_of<Real>(combine), at<Real>(statistics),
         at<Real>(gate), at<Real>(loss));
}

}  // namespace

extern const Launchers EOPD_LAUNCHERS;
const Launchers EOPD_LAUNCHERS{
    {row_statistics, row_gradient, row_loss_and_gradient, row_mixture, row_mixture_gradient}, shared_bytes};

}  // namespace eopd::cuda
