// Clusters of blocks, and tensor copies into their shared memory (compute capability 9.0).
#pragma once
#include "ptx.cuh"

namespace taper {

// What the driver's cuTensorMapEncodeTiled gives.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at a barrier that lies in the shared memory of block `rank` of the cluster where `bar` lies in one's own.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 r;\n\tmapa.shared::cluster.u32 r, %0, %1;\n\tmbarrier.arrive.shared::cluster.b64 "
      "_, [r];\n\t}" ::"r"(bar),
      "r"(rank)
      : "memory");
}
// What lies in the shared memory of block `rank` of the cluster where `at` lies in one's own.
__device__ __forceinline__ float4 lds_float4_of(uint32_t at, uint32_t rank) {
  float4 v;
  asm volatile(
      "{\n\t.reg .b32 r;\n\tmapa.shared::cluster.u32 r, %4, %5;\n\tld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [r];\n\t}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(at), "r"(rank)
      : "memory");
  return v;
}
// Whether a phase has ended.
__device__ __forceinline__ bool mbarrier_test(uint32_t bar, uint32_t parity) {
  uint32_t yes;
  asm volatile(
      "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(yes)
      : "r"(bar), "r"(parity)
      : "memory");
  return yes;
}
// Box of a matrix from element (column, row) on. What lies outside the matrix is zero.
__device__ __forceinline__ void tensor_copy(uint32_t to, const TensorMap& map, int column, int row, uint32_t bar,
                                            uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(bar), "l"(policy)
      : "memory");
}
// The same, to the same place of all blocks of the cluster that `mask` has.
__device__ __forceinline__ void tensor_copy_to_all(uint32_t to, const TensorMap& map, int column, int row, uint32_t bar,
                                                   uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_"
      "hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(bar), "h"(mask), "l"(policy)
      : "memory");
}
// As bulk_copy, likewise to all.
__device__ __forceinline__ void bulk_copy_to_all(uint32_t to, const void* from, uint32_t bytes, uint32_t bar,
                                                 uint16_t mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1], "
      "%2, [%3], %4, %5;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "h"(mask), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Whether this is the lane that is to act for its warp.
__device__ __forceinline__ bool elected() {
  uint32_t yes;
  asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xFFFFFFFF;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(yes));
  return yes;
}
#endif

}  // namespace taper
