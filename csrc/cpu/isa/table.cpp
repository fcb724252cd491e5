// The table of functions of one instruction set: flashbrush_kernels_<isa>(), which schedule/dispatch.cpp
// chooses from.
#include "isa/matmul.h"
#include "kernels.h"

#define FB_TEXT(x) #x
#define FB_STRING(x) FB_TEXT(x)
#define FB_JOIN(a, b) a##b
#define FB_NAME(isa) FB_JOIN(flashbrush_kernels_, isa)

namespace flashbrush {
namespace FLASHBRUSH_ISA {

size_t key_tile_bytes(const FbAttention*);
size_t value_tile_bytes(const FbAttention*);
size_t scratch_bytes(const FbAttention*, int64_t);
void pack(const FbAttention*, const Layout*, int64_t, int64_t, int64_t, int64_t, const Packed*);
void rows(const FbAttention*, const Layout*, const RowTask*, const Packed*, float*, char*);
void scale_row(const FbAttention*, int64_t, int64_t, const float*);
size_t few_rows_sums(const FbAttention*);
size_t few_rows_scratch(const FbAttention*);
void few_rows_sweep(const FewRows*, int64_t, int32_t, int32_t, bool, char*);
void few_rows_merge(const FewRows*);
void few_rows_finish(const FewRows*);
BackwardSizes backward_sizes(const FbAttention*, int64_t);
void backward_unit(const FbBackward*, const Layout*, const RowTask*, int64_t, int64_t, int64_t,
                   const BackwardPacked*, char*);
size_t column_mass_scratch(const FbAttention*);
void column_mass_block(const FbColumnMass*, const ColumnTask*, char*);
void norm_rope_token(const FbNormRope*, int64_t, int64_t);
void norm_rope_backward_token(const FbNormRopeBackward*, int64_t, int64_t, int64_t);

}  // namespace FLASHBRUSH_ISA
}  // namespace flashbrush

extern "C" const flashbrush::Kernels* FB_NAME(FLASHBRUSH_ISA)() {
  using namespace flashbrush::FLASHBRUSH_ISA;
  static const flashbrush::Kernels kernels = {
      FB_STRING(FLASHBRUSH_ISA),
      kRowGroup,
      W,
      kHasPairs,
      key_tile_bytes,
      value_tile_bytes,
      scratch_bytes,
      pack,
      rows,
      scale_row,
      few_rows_sums,
      few_rows_scratch,
      few_rows_sweep,
      few_rows_merge,
      few_rows_finish,
      backward_sizes,
      backward_unit,
      column_mass_scratch,
      column_mass_block,
      norm_rope_token,
      norm_rope_backward_token,
  };
  return &kernels;
}
