// The five row functions on a CPU: docs/math.md. setup.py compiles this file once per instruction set, with
// EOPD_INSTRUCTION_SET naming it; everything but the table at the end is private to the object.
//
// A row is visited twice, in blocks that stay in the first-level cache: all eight sums on the first visit, the gradient on
// the second, from the exponentials that the first has left in the thread's workspace. Other dtypes than the one computed
// in, and transforms, pass through a scratch block; the loops over columns know nothing of either.
#include <new>

#include "block.h"
#include "mixture.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace eopd::cpu {
namespace {

// `out` is streamed past the caches where it is larger than what they could keep for its reader: with two threads 1.8 times
// torch.add instead of 2.0. Only rows that begin at a multiple of a register, so that a column goes through the same
// instructions wherever `out` lies.
constexpr int64_t streamed_bytes = 16 << 20;

inline int64_t blocks_of(int64_t columns) { return (columns + block_columns - 1) / block_columns; }

// Memory for the exponentials of one row per thread, every block at the beginning of a cache line (else 7 % slower). It is
// allocated before the threads start, because nothing may throw among them.
template <typename Real>
class Workspace {
 public:
  Workspace(int threads, int64_t columns)
      : blocks_(blocks_of(columns)),
        all_(static_cast<Real*>(::operator new[](threads * size_of_thread() * sizeof(Real), alignment))) {}
  ~Workspace() { ::operator delete[](all_, alignment); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  KeptBlock<Real> block(int thread, int64_t column) const {
    Real* student = all_ + thread * size_of_thread();
    Real* teacher = student + blocks_ * block_columns;
    Real* maxima = teacher + blocks_ * block_columns + 2 * (column / block_columns);
    return {student + column, teacher + column, maxima, maxima + 1};
  }

 private:
  static constexpr std::align_val_t alignment{64};
  int64_t size_of_thread() const { return 2 * blocks_ * block_columns + (2 * blocks_ + 15) / 16 * 16; }
  int64_t blocks_;
  Real* all_;
};

// A thread's own memory; the workspace is null where there is only one visit.
template <typename Real>
struct Scratch {
  alignas(64) Real student[block_columns];
  alignas(64) Real teacher[block_columns];
  alignas(64) Real gradient[block_columns];
  const Workspace<Real>* workspace;
  int thread;
  KeptBlock<Real> kept(int64_t column) const {
    return workspace ? workspace->block(thread, column) : KeptBlock<Real>{};
  }
};

template <typename Real>
constexpr DType dtype_of = sizeof(Real) == 8 ? DType::float64 : DType::float32;

bool is_identity(const Transform& transform) {
  return transform.softcap == 0 && transform.scale == transform.temperature;
}

// Transformed logits in Real: the tensor itself where it holds just that, else the scratch block.
template <typename Real>
const Real* load_block(const Matrix& logits, const Transform& transform, int64_t row, int64_t column, int count,
                       Real* scratch) {
  const char* from = element(logits, row, column);
  if (logits.dtype == dtype_of<Real> && is_identity(transform)) return reinterpret_cast<const Real*>(from);
  widen_block(logits.dtype, from, count, scratch);
  if (!is_identity(transform)) transform_block(transform, count, scratch);
  return scratch;
}

inline int block_count(int64_t columns, int64_t column) {
  return static_cast<int>(columns - column < block_columns ? columns - column : block_columns);
}

struct Reads {
  bool student, teacher;
};

// Calls function(student, teacher, column, count) for each block of a row; what is not read is null. Inlined by force, as
// what it is given and store_columns are: left to the compiler, row_loss_and_gradient took 1 to 2 % longer.
template <typename Real, typename Function>
inline __attribute__((always_inline)) void for_blocks(const Problem& problem, int64_t row, Reads reads,
                                                      Scratch<Real>& scratch, Function function) {
  for (int64_t column = 0; column < problem.columns; column += block_columns) {
    const int count = block_count(problem.columns, column);
    const Real* student = nullptr;
    const Real* teacher = nullptr;
    if (reads.student)
      student = load_block(problem.student, problem.student_transform, row, column, count, scratch.student);
    if (reads.teacher)
      teacher = load_block(problem.teacher, problem.teacher_transform, row, column, count, scratch.teacher);
    function(student, teacher, column, count);
  }
}

template <typename Real>
RowStatistics<double> statistics_of_row(const Problem& problem, int64_t row, Scratch<Real>& scratch) {
  RowStatistics<double> statistics;
  for_blocks(problem, row, {true, true}, scratch, [&](auto student, auto teacher, int64_t column, int count) {
    const int64_t next = column + count < problem.columns ? column + count : column;
    const Upcoming upcoming{element(problem.student, row, next), element(problem.teacher, row, next),
                            size_of(problem.student.dtype), size_of(problem.teacher.dtype)};
    with_constant(scratch.workspace != nullptr, [&](auto keeps) {
      add_block<keeps.value>(statistics, student, teacher, count, upcoming, scratch.kept(column));
    });
  });
  return statistics;
}

void zero_row(const Problem& problem, int64_t row) {
  std::memset(element(problem.out, row, 0), 0, problem.columns * size_of(problem.out.dtype));
}

// dz/dx where it is one number for the row, else 1: the slope of a softcap is applied to a block of gradients.
inline double row_slope(const Transform& transform) {
  return transform.softcap != 0 ? 1 : transform.scale / transform.temperature;
}

// Writes a row's gradient; gradient(student, teacher, column, count, past_caches, to) writes that of a block by the
// transformed logits, and what it does not read is null.
template <typename Real, typename Gradient>
inline __attribute__((always_inline)) void store_gradient(const Problem& problem, int64_t row, Reads reads,
                                                          Scratch<Real>& scratch, Gradient gradient) {
  const Transform& transform = problem.student_transform;
  const Matrix& out = problem.out;
  const bool softcapped = transform.softcap != 0;
  const bool direct = out.dtype == dtype_of<Real> && !softcapped;
  const bool past_caches = direct && out.data != problem.student.data &&
                           problem.rows * problem.columns * size_of(out.dtype) >= streamed_bytes &&
                           reinterpret_cast<uintptr_t>(element(out, row, 0)) % EOPD_VECTOR_BYTES == 0;
  reads.student = reads.student || softcapped;
  for_blocks(problem, row, reads, scratch, [&](const Real* student, const Real* teacher, int64_t column, int count) {
    char* to = element(out, row, column);
    Real* block = direct ? reinterpret_cast<Real*>(to) : scratch.gradient;
    gradient(student, teacher, column, count, past_caches, block);
    if (softcapped) multiply_by_slope(transform, count, student, block);
    if (!direct) narrow_block(out.dtype, block, count, to);
  });
}

template <typename Real>
void gradient_of_row(const Problem& problem, int64_t row, const RowStatistics<double>& statistics,
                     const Coefficients<double>& k, Scratch<Real>& scratch) {
  if (unused(k)) return zero_row(problem, row);
  const auto column_k = column_coefficients(statistics, k, row_slope(problem.student_transform));
  const Reads reads{k.b != 0 || !scratch.workspace, k.b != 0 || (k.c != 0 && !scratch.workspace)};
  store_gradient(problem, row, reads, scratch,
                 [&](auto student, auto teacher, int64_t column, int count, bool past_caches, Real* to) {
                   gradient_block(statistics, column_k, k.b != 0, k.c != 0, student, teacher, count,
                                  scratch.kept(column), past_caches, to);
                 });
}

template <typename Real>
MixtureStatistics<double> mixture_of_row(const Problem& problem, int64_t row, const RowStatistics<double>& statistics,
                                         const std::array<double, 2>& skews, Scratch<Real>& scratch) {
  const MixtureRow<Real> mixed = mixture_row(statistics, skews_of<Real>(skews));
  MixtureStatistics<double> sums;
  for_blocks(problem, row, {true, true}, scratch, [&](auto student, auto teacher, int64_t, int count) {
    add_mixture_block(sums, mixed, student, teacher, count);
  });
  return normalised(sums, statistics);
}

template <typename Real>
void mixture_gradient_of_row(const Problem& problem, int64_t row, const RowStatistics<double>& statistics,
                             const Coefficients<double>& k, const std::array<double, 2>& skews,
                             Scratch<Real>& scratch) {
  if (unused(k)) return zero_row(problem, row);
  const MixtureRow<Real> mixed = mixture_row(statistics, skews_of<Real>(skews));
  const auto [self, ratio, other] = mixture_coefficients(statistics, k, row_slope(problem.student_transform));
  const ColumnCoefficients<Real> column_k{Real(self), Real(ratio), Real(other)};
  store_gradient(problem, row, {true, true}, scratch,
                 [&](auto student, auto teacher, int64_t, int count, bool past_caches, Real* to) {
                   mixture_gradient_block(mixed, column_k, k.b != 0, k.c != 0, student, teacher, count, past_caches, to);
                 });
}

template <typename Real>
RowStatistics<double> load_statistics(Address statistics, int64_t row) {
  const Real* from = at<const Real>(statistics) + 8 * row;
  return {from[0], from[1], from[2], from[3], from[4], from[5], from[6], from[7]};
}

template <typename Real>
void store_statistics(const RowStatistics<double>& numbers, Address statistics, int64_t row) {
  const RowStatistics<double>& n = numbers;
  const double in_order[8] = {n.student_max,  n.student_sum,   n.teacher_max,  n.teacher_sum,
                              n.teacher_self, n.teacher_cross, n.student_self, n.student_cross};
  Real* to = at<Real>(statistics) + 8 * row;
  for (int i = 0; i < 8; ++i) to[i] = Real(in_order[i]);
}

template <typename Real>
Coefficients<double> load_coefficients(Address a, Address b, Address c, int64_t row) {
  return {at<const Real>(a)[row], at<const Real>(b)[row], at<const Real>(c)[row]};
}

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Rows are handed out one by one, short ones in groups worth a thread's waking: a masked row costs nothing and a gated one
// more than others. Nothing among the threads throws.
template <typename Real, typename Function>
void for_rows(const Task& task, const Workspace<Real>* workspace, Function function) {
  const int64_t rows = task.rows;
  const int64_t rows_at_once = 1 + (1 << 16) / (task.columns + 1);
  const int64_t groups = 1 + (rows - 1) / rows_at_once;
  const int threads = groups < task.threads ? static_cast<int>(groups) : task.threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Scratch<Real> scratch;
    scratch.workspace = workspace;
    scratch.thread = this_thread();
#pragma omp for schedule(dynamic, rows_at_once) nowait
    for (int64_t row = 0; row < rows; ++row) function(row, scratch);
    finish_streaming();
  }
}

template <typename Function>
void with_real(const Problem& problem, Function function) {
  if (problem.student.dtype == DType::float64 || problem.teacher.dtype == DType::float64) {
    function(double{});
  } else {
    function(float{});
  }
}

void row_statistics(const Task& task, Address statistics) {
  with_real(task, [&](auto kind) {
    using Real = decltype(kind);
    for_rows<Real>(task, nullptr, [&](int64_t row, Scratch<Real>& scratch) {
      store_statistics<Real>(statistics_of_row(task, row, scratch), statistics, row);
    });
  });
}

void row_gradient(const Task& task, Address statistics, Address a, Address b, Address c) {
  with_real(task, [&](auto kind) {
    using Real = decltype(kind);
    for_rows<Real>(task, nullptr, [&](int64_t row, Scratch<Real>& scratch) {
      gradient_of_row(task, row, load_statistics<Real>(statistics, row), load_coefficients<Real>(a, b, c, row),
                      scratch);
    });
  });
}

void row_mixture(const Task& task, Address statistics, const std::array<double, 2>& skews, Address mixture) {
  with_real(task, [&](auto kind) {
    using Real = decltype(kind);
    for_rows<Real>(task, nullptr, [&](int64_t row, Scratch<Real>& scratch) {
      const auto numbers = mixture_of_row(task, row, load_statistics<Real>(statistics, row), skews, scratch);
      Real* to = at<Real>(mixture) + 4 * row;
      to[0] = Real(numbers.forward_kl);
      to[1] = Real(numbers.reverse_kl);
      to[2] = Real(numbers.forward_share);
      to[3] = Real(numbers.reverse_share);
    });
  });
}

void row_mixture_gradient(const Task& task, Address statistics, Address a, Address b, Address c,
                          const std::array<double, 2>& skews) {
  with_real(task, [&](auto kind) {
    using Real = decltype(kind);
    for_rows<Real>(task, nullptr, [&](int64_t row, Scratch<Real>& scratch) {
      mixture_gradient_of_row(task, row, load_statistics<Real>(statistics, row), load_coefficients<Real>(a, b, c, row),
                              skews, scratch);
    });
  });
}

void row_loss_and_gradient(const Task& task, Address weights, double gate_threshold,
                           const std::array<double, 4>& combine, Address statistics, Address gate, Address loss) {
  with_real(task, [&](auto kind) {
    using Real = decltype(kind);
    const Workspace<Real> workspace(task.threads, task.columns);
    for_rows<Real>(task, &workspace, [&](int64_t row, Scratch<Real>& scratch) {
      const double weight = at<const Real>(weights)[row];
      RowStatistics<double> of_row;
      double opened = 0, of_weight_one = 0;
      Coefficients<double> coefficients{0, 0, 0};
      if (weight != 0) {
        of_row = statistics_of_row(task, row, scratch);
        opened = open_gate(of_row, gate_threshold);
        of_weight_one = gated_loss(of_row, opened, combine_of<double>(combine));
        coefficients = gated_coefficients(of_row, opened, weight, combine_of<double>(combine));
      }
      store_statistics<Real>(of_row, statistics, row);
      at<Real>(gate)[row] = Real(opened);
      at<Real>(loss)[row] = Real(of_weight_one);
      gradient_of_row(task, row, of_row, coefficients, scratch);
    });
  });
}

}  // namespace

#define EOPD_QUOTED_AGAIN(name) #name
#define EOPD_QUOTED(name) EOPD_QUOTED_AGAIN(name)
#define EOPD_TABLE_AGAIN(name) kernels_##name
#define EOPD_TABLE(name) EOPD_TABLE_AGAIN(name)

extern const Kernels EOPD_TABLE(EOPD_INSTRUCTION_SET);
const Kernels EOPD_TABLE(EOPD_INSTRUCTION_SET){
    {row_statistics, row_gradient, row_loss_and_gradient, row_mixture, row_mixture_gradient},
    EOPD_QUOTED(EOPD_INSTRUCTION_SET)};

}  // namespace eopd::cpu
