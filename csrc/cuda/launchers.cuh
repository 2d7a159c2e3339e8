// The launchers of one pair of widths: EOPD_STUDENT and EOPD_TEACHER name the types of storage.cuh, EOPD_LAUNCHERS the
// table. A pair is an object of its own, launchers_*.cu, so that the build is parallel.
#include <algorithm>

#include "kernels.cuh"
#include "launch.cuh"
#include "mixture_kernels.cuh"

namespace eopd::cuda {
namespace {

using Pair = Sides<EOPD_STUDENT, EOPD_TEACHER>;
using Real = Pair::Real;
constexpr int64_t scratch_bytes = sizeof(Merge<RowStatistics<Real>>::Scratch);

LogitTransform<Real> factors_of(const Transform& transform) {
  const bool softcap = transform.softcap != 0;
  const double width = softcap ? transform.softcap : transform.temperature;
  return {Real(transform.scale / width), Real(transform.softcap / transform.temperature), softcap};
}

Block<Real> block_of(const Problem& problem) {
  if (problem.columns > 1 << 30)  // a column's index is an int, and its distance in bytes computed from it
    throw std::invalid_argument("a row may have 2^30 columns, got " + std::to_string(problem.columns));
  const Transform& student = problem.student_transform;
  const bool softcap = student.softcap != 0;
  const Chain<Real> chain{Real(student.scale / student.temperature),
                          Real(softcap ? student.temperature / student.softcap : 0), softcap};
  return {problem.student, problem.teacher, factors_of(student), factors_of(problem.teacher_transform), chain,
          problem.rows, int(problem.columns)};
}

Shape shape_of(const Problem& problem, const Plan& plan, int64_t bytes) {
  return {int(std::min<int64_t>(problem.rows, plan.clusters)), plan.cluster, plan.threads, bytes};
}

template <Kept kept>
int64_t bytes_of_row(const Problem& problem, const Plan& plan) {
  return OnChip<Pair, kept>::shared_bytes(int(problem.columns), plan.cluster, plan.threads);
}

void row_statistics_of_pair(const Problem& problem, const Plan& plan, const Place& place, void* statistics) {
  const int64_t bytes = scratch_bytes + bytes_of_row<Kept::nothing>(problem, plan);
  launch("row_statistics", row_statistics_kernel<Pair>, shape_of(problem, plan, bytes), place, block_of(problem),
         static_cast<Real*>(statistics));
}

void row_gradient_of_pair(const Problem& problem, const Plan& plan, const Place& place, const void* statistics,
                          const void* a, const void* b, const void* c, const Matrix& out) {
  launch("row_gradient", row_gradient_kernel<Pair>,
         shape_of(problem, plan, bytes_of_row<Kept::nothing>(problem, plan)), place, block_of(problem),
         static_cast<const Real*>(statistics), static_cast<const Real*>(a), static_cast<const Real*>(b),
         static_cast<const Real*>(c), out);
}

void row_mixture_of_pair(const Problem& problem, const Plan& plan, const Place& place, const void* statistics,
                         const double* skews, void* mixture) {
  const int64_t bytes = sizeof(Merge<MixtureStatistics<Real>>::Scratch) + bytes_of_row<Kept::nothing>(problem, plan);
  launch("row_mixture", row_mixture_kernel<Pair>, shape_of(problem, plan, bytes), place, block_of(problem),
         static_cast<const Real*>(statistics), skews_of<Real>(skews), static_cast<Real*>(mixture));
}

void row_mixture_gradient_of_pair(const Problem& problem, const Plan& plan, const Place& place, const void* statistics,
                                  const void* a, const void* b, const void* c, const double* skews, const Matrix& out) {
  launch("row_mixture_gradient", row_mixture_gradient_kernel<Pair>,
         shape_of(problem, plan, bytes_of_row<Kept::nothing>(problem, plan)), place, block_of(problem),
         static_cast<const Real*>(statistics), static_cast<const Real*>(a), static_cast<const Real*>(b),
         static_cast<const Real*>(c), skews_of<Real>(skews), out);
}

template <Kept kept>
void launch_keeping(const Problem& problem, const Plan& plan, const Place& place, const void* weights,
                    double gate_threshold, const double* combine, void* statistics, void* gate, const Matrix& out) {
  const Combine<Real> of_terms{Real(combine[0]), Real(combine[1]), Real(combine[2]), Real(combine[3])};
  const int64_t bytes = scratch_bytes + bytes_of_row<kept>(problem, plan);
  launch("row_loss_and_gradient", row_loss_and_gradient_kernel<Pair, kept>, shape_of(problem, plan, bytes), place,
         block_of(problem), static_cast<const Real*>(weights), Gate<Real>{Real(gate_threshold)}, of_terms,
         static_cast<Real*>(statistics), static_cast<Real*>(gate), out);
}

// One column at a time is not worth keeping: see AnyBits.
constexpr bool keeps = Slice<Pair>::in_groups;

void check_kept(const Plan& plan, const Problem& problem) {
  const bool known = plan.kept == int(Kept::nothing) || (keeps && plan.kept > 0 && plan.kept <= int(Kept::registers));
  if (!known) throw std::invalid_argument("these dtypes cannot be kept as " + std::to_string(plan.kept));
  if constexpr (keeps) {
    const int64_t room = int64_t(OnChip<Pair, Kept::registers>::most) * plan.threads;
    const int64_t groups = most_groups<Pair>(int(problem.columns), plan.cluster);
    if (plan.kept == int(Kept::registers) && groups > room)
      throw std::invalid_argument("registers hold " + std::to_string(room) + " groups of a CTA, got " +
                                  std::to_string(groups));
  }
}

template <typename... Arguments>
void row_loss_and_gradient_of_pair(const Problem& problem, const Plan& plan, Arguments... arguments) {
  check_kept(plan, problem);
  if constexpr (keeps) {
    if (plan.kept == int(Kept::shared)) return launch_keeping<Kept::shared>(problem, plan, arguments...);
    if (plan.kept == int(Kept::registers)) return launch_keeping<Kept::registers>(problem, plan, arguments...);
  }
  launch_keeping<Kept::nothing>(problem, plan, arguments...);
}

int64_t shared_bytes_of_pair(const Problem& problem, const Plan& plan) {
  check_kept(plan, problem);
  if constexpr (keeps) {
    if (plan.kept == int(Kept::shared)) return scratch_bytes + bytes_of_row<Kept::shared>(problem, plan);
    if (plan.kept == int(Kept::registers)) return scratch_bytes + bytes_of_row<Kept::registers>(problem, plan);
  }
  return scratch_bytes + bytes_of_row<Kept::nothing>(problem, plan);
}

}  // namespace

extern const Launchers EOPD_LAUNCHERS;
const Launchers EOPD_LAUNCHERS{row_statistics_of_pair,        row_gradient_of_pair,
                               row_loss_and_gradient_of_pair, row_mixture_of_pair,
                               row_mixture_gradient_of_pair,  shared_bytes_of_pair};

}  // namespace eopd::cuda
