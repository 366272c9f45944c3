// Products of whole warpgroups (wgmma, compute capability 9.0, code for sm_90a): D (64 x N) += A (64 x 16, registers)
// B (16 x N, shared memory). PTX wants each accumulator named, so the text below is long; the function is one.
#pragma once
#include "ptx.cuh"

namespace taper {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Registers that the tensor cores read must be complete.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING = 0>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of a matrix whose rows are 128 bytes of K, swizzled as tensor copies do (128 bytes); `at`: 16 bits of K on
// are 32 bytes on.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t at) {
  return (uint64_t)(at >> 4 & 0x3FFF) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
// Descriptor of B: no swizzle, 8 x 16-byte blocks that lie 128 bytes apart over its columns and `chunk` bytes apart
// over K.
__device__ __forceinline__ uint64_t b_descriptor(uint32_t at, uint32_t chunk) {
  return (uint64_t)(at >> 4 & 0x3FFF) | (uint64_t)(chunk >> 4) << 16 | (uint64_t)(128 >> 4) << 32;
}

#define WGMMA_OF(N, TYPE, NAMES, A0, A1, A2, A3, B, ...)                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, {" A0 "," A1 "," A2 \
               "," A3 "}, " B ", 1, 1, 1, 0;"                                                                     \
               : __VA_ARGS__                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA(N, NAMES, A0, A1, A2, A3, B, ...)                \
  if constexpr (F16_TYPE)                                      \
    WGMMA_OF(N, "f16", NAMES, A0, A1, A2, A3, B, __VA_ARGS__); \
  else                                                         \
    WGMMA_OF(N, "bf16", NAMES, A0, A1, A2, A3, B, __VA_ARGS__)
#define FOUR(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 1), FOUR(i + 2), FOUR(i + 3)
#define THIRTY_TWO(i) SIXTEEN(i), SIXTEEN(i + 4)
#define NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_32                                                                                                  \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define NAMES_64                                                                                                  \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90," \
  "%91,%92,%93,%94,%95"
#define NAMES_96                                                                                                     \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118," \
  "%119,%120,%121,%122,%123,%124,%125,%126,%127"

// c[i][..] are the accumulators of columns 8 i to 8 i + 7, as mma's. A and B are bf16, or f16.
template <bool F16_TYPE, int NB>
__device__ __forceinline__ void wgmma(float (&c)[NB][4], const uint32_t* a, uint64_t b) {
  static_assert(NB == 4 || NB == 8 || NB == 16 || NB == 24 || NB == 32, "");
  if constexpr (NB == 4) {
    WGMMA(32, NAMES_0, "%16", "%17", "%18", "%19", "%20", SIXTEEN(0));
  } else if constexpr (NB == 8) {
    WGMMA(64, NAMES_0 NAMES_16, "%32", "%33", "%34", "%35", "%36", THIRTY_TWO(0));
  } else if constexpr (NB == 16) {
    WGMMA(128, NAMES_0 NAMES_16 NAMES_32, "%64", "%65", "%66", "%67", "%68", THIRTY_TWO(0), THIRTY_TWO(8));
  } else if constexpr (NB == 24) {
    WGMMA(192, NAMES_0 NAMES_16 NAMES_32 NAMES_64, "%96", "%97", "%98", "%99", "%100", THIRTY_TWO(0), THIRTY_TWO(8),
          THIRTY_TWO(16));
  } else {
    WGMMA(256, NAMES_0 NAMES_16 NAMES_32 NAMES_64 NAMES_96, "%128", "%129", "%130", "%131", "%132", THIRTY_TWO(0),
          THIRTY_TWO(8), THIRTY_TWO(16), THIRTY_TWO(24));
  }
}

// The same with e4m3, which has K twice as wide; without `add`: D = A B. It should not be known at compile time: ptxas
// then keeps the accumulators of products that follow one another in the same registers.
#define WGMMA_8(N, NAMES, A0, A1, A2, A3, B, ADD, ...)                                                                \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, " ADD ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N              \
               "k32.f32.e4m3.e4m3 {" NAMES "}, {" A0 "," A1 "," A2 "," A3 "}, " B ", p, 1, 1;\n\t}"                   \
               : __VA_ARGS__                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((uint32_t)add))
template <int NB>
__device__ __forceinline__ void wgmma_e4m3(float (&c)[NB][4], const uint32_t* a, uint64_t b, uint32_t add) {
  static_assert(NB == 8 || NB == 16, "");
  if constexpr (NB == 8)
    WGMMA_8(64, NAMES_0 NAMES_16, "%32", "%33", "%34", "%35", "%36", "%37", THIRTY_TWO(0));
  else
    WGMMA_8(128, NAMES_0 NAMES_16 NAMES_32, "%64", "%65", "%66", "%67", "%68", "%69", THIRTY_TWO(0), THIRTY_TWO(8));
}

// D (64 x N) += A (64 x 16) B (16 x N), both of bf16 and in shared memory.
#define WGMMA_SHARED(N, NAMES, A, B, ...)                                                                          \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, " A ", " B ", 1, 1, 1, 0, 0;" \
               : __VA_ARGS__                                                                                       \
               : "l"(a), "l"(b))
template <int NB>
__device__ __forceinline__ void wgmma_shared(float (&c)[NB][4], uint64_t a, uint64_t b) {
  static_assert(NB == 4 || NB == 8 || NB == 16, "");
  if constexpr (NB == 4)
    WGMMA_SHARED(32, NAMES_0, "%16", "%17", SIXTEEN(0));
  else if constexpr (NB == 8)
    WGMMA_SHARED(64, NAMES_0 NAMES_16, "%32", "%33", THIRTY_TWO(0));
  else
    WGMMA_SHARED(128, NAMES_0 NAMES_16 NAMES_32, "%64", "%65", THIRTY_TWO(0), THIRTY_TWO(8));
}
#undef WGMMA_SHARED
#undef WGMMA_8
#undef WGMMA
#undef WGMMA_OF
#undef FOUR
#undef SIXTEEN
#undef THIRTY_TWO
#undef NAMES_0
#undef NAMES_16
#undef NAMES_32
#undef NAMES_64
#undef NAMES_96
#endif

}  // namespace taper
