// The places that a thread's groups can be kept in between the visits of a row.
//
//   nothing     a ring of a few groups per thread in shared memory: the second visit loads them again
//   shared      every group in shared memory
//   registers   the student's in shared memory, the teacher's in registers
//
// A group is brought by the thread that will use it, on both visits, so that no barrier stands between a copy and its
// use. Copies run ahead of the arithmetic, and their number in flight is what hides the memory's latency.
#pragma once

#include "row.cuh"

namespace eopd::cuda {

enum class Kept : int { nothing = 0, shared = 1, registers = 2 };

// Groups under way per thread. 640 threads of a multiprocessor with 32 bytes in each of 3 are 60 KB, where latency times
// bandwidth is some 20 KB on an H100 and 43 KB on a B200 (0.8 us; data sheets, not measured); a deeper ring would take
// shared memory from the streaming kernel.
constexpr int groups_ahead = 3;
constexpr int ring_groups = groups_ahead + 1;

// What a CTA is compiled for. Two of 320 threads leave a thread 96 registers; 384 left it 80, 512 left it 64, and both
// spilled. Where registers keep the teacher, two of 192 leave it 168, 100 of them for 25 vectors: V = 153,600 in fp32 on
// a cluster of 8, twice that on 16. Groups of 8 columns take more registers to compute with, and spilled beside 25.
constexpr int usual_threads = 320;
constexpr int threads_with_registers = 192;
template <typename Sides>
constexpr int vectors_in_registers = Sides::columns == 4 ? 25 : 24;

// Shared memory as slots of a group each; the vectors of a group lie apart, so that neighbouring threads touch neighbouring
// 16 bytes.
template <typename Sides, bool with_teacher>
class Slots {
 public:
  using StudentGroup = typename Sides::StudentGroup;
  using TeacherGroup = typename Sides::TeacherGroup;
  static constexpr int vectors = Sides::student_vectors + (with_teacher ? Sides::teacher_vectors : 0);

  __device__ __forceinline__ Slots(char* memory, int slots)
      : student_(reinterpret_cast<Vector16*>(memory)), teacher_(student_ + Sides::student_vectors * slots), slots_(slots) {}

  // Begins to bring a group of this CTA's, if there is one, and closes the thread's group of copies.
  template <bool aligned>
  __device__ __forceinline__ void fetch(const Slice<Sides>& slice, int group, int slot) {
    if (group < slice.groups) {
      const int column = slice.first_column + group * Sides::columns;
      fetch_side<typename Sides::Student>(slice.student, column, slice.block.student.dtype,
                                          aligned || slice.student_aligned, student_ + slot);
      if constexpr (with_teacher)
        fetch_side<typename Sides::Teacher>(slice.teacher, column, slice.block.teacher.dtype,
                                            aligned || slice.teacher_aligned, teacher_ + slot);
    }
    hardware::close_copies();
  }

  __device__ __forceinline__ StudentGroup student(int slot) const { return read<StudentGroup>(student_ + slot); }
  __device__ __forceinline__ TeacherGroup teacher(int slot) const { return read<TeacherGroup>(teacher_ + slot); }

 private:
  template <typename Bits>
  __device__ __forceinline__ void fetch_side(const char* row, int column, DType dtype, bool aligned, Vector16* to) {
    using Group = typename Bits::template Group<Sides::columns>;
    constexpr int count = sizeof(Group) / 16;
    if (Slice<Sides>::in_groups && aligned) {
      const char* from = row + int64_t(column) * Bits::bytes;
#pragma unroll
      for (int i = 0; i < count; ++i) hardware::begin_copy(to + i * slots_, from + 16 * i);
    } else {
      const Group group = Bits::template gather<Sides::columns>(row, column, dtype);
#pragma unroll
      for (int i = 0; i < count; ++i) to[i * slots_] = group.vector[i];
    }
  }

  template <typename Group>
  __device__ __forceinline__ Group read(const Vector16* from) const {
    Group group;
#pragma unroll
    for (int i = 0; i < int(sizeof(Group) / 16); ++i) group.vector[i] = from[i * slots_];
    return group;
  }

  Vector16* student_;  // [vectors of a group, slots]
  Vector16* teacher_;  // [vectors of a group, slots]
  int slots_;
};

// The most groups that any CTA of a row holds.
template <typename Sides>
__host__ __device__ __forceinline__ int most_groups(int columns, int parts) {
  return (columns / Sides::columns + parts - 1) / parts;
}

// The places nothing and shared: a ring and the whole part differ in the number of slots, and in what a second visit has
// to do.
template <typename Sides, Kept kept>
class OnChip {
 public:
  static constexpr int threads = usual_threads, blocks_per_multiprocessor = Slice<Sides>::in_groups ? 2 : 1;

  static __host__ __device__ __forceinline__ int slots_of(int columns, int parts, int block_threads) {
    return kept == Kept::nothing ? ring_groups * block_threads : most_groups<Sides>(columns, parts);
  }
  static int64_t shared_bytes(int columns, int parts, int block_threads) {
    return int64_t(16) * slots_of(columns, parts, block_threads) * Slots<Sides, true>::vectors;
  }

  __device__ __forceinline__ OnChip(char* memory, int columns)
      : slots_(memory, slots_of(columns, hardware::cluster_size(), hardware::threads_per_block())) {}

  // Calls function(column, student's group, teacher's group) for each of this thread's groups.
  template <bool aligned, typename Function>
  __device__ __forceinline__ void visit(const Slice<Sides>& slice, Function function) {
    const int stride = hardware::threads_per_block();
    int coming = hardware::thread_index(), into = coming;
#pragma unroll
    for (int i = 0; i < groups_ahead; ++i, coming += stride, into = after(into))
      slots_.template fetch<aligned>(slice, coming, into);
    int slot = hardware::thread_index();
    for (int group = slot; group < slice.groups; group += stride, slot = after(slot)) {
      slots_.template fetch<aligned>(slice, coming, into);
      coming += stride, into = after(into);
      hardware::wait_for_copies<groups_ahead>();
      function(slice.first_column + group * Sides::columns, slots_.student(slot), slots_.teacher(slot));
    }
  }

  template <bool aligned, typename Function>
  __device__ __forceinline__ void visit_again(const Slice<Sides>& slice, Function function) {
    if constexpr (kept == Kept::nothing) {
      visit<aligned>(slice, function);
    } else {
      const int stride = hardware::threads_per_block();
      for (int group = hardware::thread_index(); group < slice.groups; group += stride)
        function(slice.first_column + group * Sides::columns, slots_.student(group), slots_.teacher(group));
    }
  }

 private:
  // The thread's next slot: a ring's begin again, others are the groups' own.
  static __device__ __forceinline__ int after(int slot) {
    const int next = slot + hardware::threads_per_block();
    if constexpr (kept != Kept::nothing) return next;
    const int slots = ring_groups * hardware::threads_per_block();
    return next < slots ? next : next - slots;
  }

  Slots<Sides, true> slots_;
};

// Registers have no index, so a loop over them would have to be unrolled: 25 times the code of a group, 370 KB of it. Here
// they turn: the loop's body is a chunk of groups at a fixed place, and once per chunk all of them move on by one chunk,
// 20 moves a group.
template <typename Sides>
class OnChip<Sides, Kept::registers> {
 public:
  static constexpr int threads = threads_with_registers, blocks_per_multiprocessor = 2;
  static constexpr int chunk = (Sides::columns == 4 ? 5 : 4) / Sides::teacher_vectors;
  static constexpr int chunks = vectors_in_registers<Sides> / Sides::teacher_vectors / chunk, most = chunks * chunk;

  static int64_t shared_bytes(int columns, int parts, int) {
    return int64_t(16) * most_groups<Sides>(columns, parts) * Slots<Sides, false>::vectors;
  }

  __device__ __forceinline__ OnChip(char* memory, int columns)
      : slots_(memory, most_groups<Sides>(columns, hardware::cluster_size())) {}

  template <bool aligned, typename Function>
  __device__ __forceinline__ void visit(const Slice<Sides>& slice, Function function) {
    fetch_chunk<aligned>(slice, 0);
#pragma unroll 1
    for (int first = 0; first < most; first += chunk) {
      turn();  // the chunk that was fetched to the front is the last one now
      hardware::wait_for_copies<0>();
      fetch_chunk<aligned>(slice, first + chunk);
      use_chunk(slice, first, most - chunk, function);
    }
  }

  template <bool, typename Function>
  __device__ __forceinline__ void visit_again(const Slice<Sides>& slice, Function function) {
#pragma unroll 1
    for (int first = 0; first < most; first += chunk) {
      use_chunk(slice, first, 0, function);
      turn();
    }
  }

 private:
  static __device__ __forceinline__ int group_of(int i) {
    return i * hardware::threads_per_block() + hardware::thread_index();
  }

  // Brings a chunk of the thread's groups, the teacher's into the front; none beyond the last chunk, whose front is in use.
  template <bool aligned>
  __device__ __forceinline__ void fetch_chunk(const Slice<Sides>& slice, int first) {
    if (first >= most) return;
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      const int group = group_of(first + i);
      slots_.template fetch<aligned>(slice, group, group);
      if (group < slice.groups) teacher_[i] = teacher_group<aligned>(slice, group);
    }
  }

  template <bool aligned>
  __device__ __forceinline__ typename Sides::TeacherGroup teacher_group(const Slice<Sides>& slice, int group) {
    const int column = slice.first_column + group * Sides::columns;
    if (!aligned && !slice.teacher_aligned)
      return Sides::Teacher::template gather<Sides::columns>(slice.teacher, column, slice.block.teacher.dtype);
    typename Sides::TeacherGroup teacher;
#pragma unroll
    for (int j = 0; j < Sides::teacher_vectors; ++j)
      teacher.vector[j] = hardware::load_logits(slice.teacher + int64_t(column) * Sides::Teacher::bytes + 16 * j);
    return teacher;
  }

  // Calls the function for a chunk of groups, of which the teacher's are at `where` in the registers.
  template <typename Function>
  __device__ __forceinline__ void use_chunk(const Slice<Sides>& slice, int first, int where, Function function) {
#pragma unroll
    for (int i = 0; i < chunk; ++i) {
      const int group = group_of(first + i);
      if (group < slice.groups)
        function(slice.first_column + group * Sides::columns, slots_.student(group), teacher_[where + i]);
    }
  }

  __device__ __forceinline__ void turn() {
    typename Sides::TeacherGroup front[chunk];
#pragma unroll
    for (int i = 0; i < chunk; ++i) front[i] = teacher_[i];
#pragma unroll
    for (int i = 0; i < most; ++i) teacher_[i] = i + chunk < most ? teacher_[i + chunk] : front[i + chunk - most];
  }

  Slots<Sides, false> slots_;
  typename Sides::TeacherGroup teacher_[most];
};

}  // namespace eopd::cuda
