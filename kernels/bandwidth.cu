// The rate at which a GPU's memory can be read: what benchmarks relate others to. Each thread reads 16 bytes at a time, four
// of them in flight; what is read goes into a sum that nobody needs, so that it has to be read.
#include <stdint.h>

extern "C" __global__ void __launch_bounds__(512) taper_read(const uint4 *memory, uint64_t count, uint32_t *sum) {
    uint32_t found = 0;
    const uint64_t step = (uint64_t)gridDim.x * blockDim.x;
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < count; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = __ldcs(memory + i + k * step);
#pragma unroll
        for (int k = 0; k < 4; k++) found ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    for (; i < count; i += step) found ^= memory[i].x;
    if (found == 0x12345678) atomicAdd(sum, found);
}
