// What the host needs of CUDA: tensor maps and launches. The driver's function for tensor maps is looked up
// at run time, so that the library loads on machines without a driver.
#pragma once
#include "hopper.cuh"

namespace flashbrush {

using Stream = cudaStream_t;
using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

inline EncodeTiled find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
          cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  return EncodeTiled(found);
}

// Makes the map of a 16-bit tensor (items, rows, heads, dim) whose dim is contiguous; strides are bytes,
// multiples of 16. A copy takes 64 elements of box_rows rows of one head and item. Returns false if the
// driver refuses the layout.
inline bool make_map(TensorMap* map, bool half, const void* base, int64_t rows, int64_t heads, int64_t items,
                     int64_t dim, int64_t row_stride, int64_t head_stride, int64_t item_stride,
                     int box_rows) {
  static const EncodeTiled encode = find_encode();
  if (!encode) return false;
  const cuuint64_t sizes[4] = {cuuint64_t(dim), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(items)};
  const cuuint64_t strides[3] = {cuuint64_t(row_stride), cuuint64_t(head_stride), cuuint64_t(item_stride)};
  const cuuint32_t box[4] = {64, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode(map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Launches kernel(parameters) on `blocks` blocks. Returns 0 or a CUDA error.
template <typename Parameters>
int launch(void (*kernel)(Parameters), const Parameters& parameters, int blocks, int threads,
           int shared_bytes, Stream stream) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes), config.stream = stream;
    error = cudaLaunchKernelEx(&config, kernel, parameters);
  }
  if (error != cudaSuccess) (void)cudaGetLastError();  // CUDA would report it again in the next call
  return int(error);
}

inline const char* error_text(int status) {
  return status > 0 ? cudaGetErrorString(cudaError_t(status)) : nullptr;
}

}  // namespace flashbrush
