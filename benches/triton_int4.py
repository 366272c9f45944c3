#!/usr/bin/env python3
"""4-bit integers in groups of 128 times activations as others multiply them, for the tables that compare with them.

    benches/triton_int4.py [--rows 1,16] [--shape 4096x4096,14336x4096]

Needs a GPU, PyTorch and Triton. Times, in one process and over weights that rotate past the L2: cuBLAS on bf16 weights,
PyTorch's own kernel for such weights (tinygemm, which takes bf16), and a Triton kernel that splits K over blocks and adds
by atomics, the method of Hoque et al. (arXiv:2402.00025), f16: the fastest of all configurations and splits, and the
fastest that does not split. Every result is first compared with the product of the dequantised weights in f64. `target/kernels time int4_g128` (benches/kernels/main.cu) times this project's kernel the same way.
"""

import argparse
import statistics
import sys

import torch
import triton
import triton.language as tl

GROUP = 128
# Columns of the result and of K that a block takes at a time, warps, stages of its pipeline.
CONFIGS = [
    (columns, depth, warps, stages)
    for columns in (32, 64, 128)
    for depth in (64, 128)
    for warps, stages in ((2, 4), (4, 3), (4, 5), (8, 4))
]
SPLITS = [1, 2, 4, 8, 16]


@triton.jit
def split_k(
    x_at, codes_at, scales_at, zeros_at, y_at, batch, outputs, inputs, splits,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """y (batch x outputs) = x (batch x inputs) W: codes eight to a word along the inputs, a scale and a zero a group."""
    rows = tl.arange(0, 16)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    sums = tl.zeros((16, COLUMNS), tl.float32)
    for step in range(split, inputs // DEPTH, splits):
        depth = step * DEPTH + tl.arange(0, DEPTH)
        x = tl.load(x_at + rows[:, None] * inputs + depth[None, :], mask=rows[:, None] < batch, other=0.0)
        words = tl.load(codes_at + (depth // 8)[:, None] * outputs + columns[None, :])
        codes = (words >> (depth % 8 * 4)[:, None]) & 15
        place = step * DEPTH // GROUP * outputs + columns  # DEPTH divides a group
        weights = (codes.to(tl.float16) - tl.load(zeros_at + place)[None, :]) * tl.load(scales_at + place)[None, :]
        sums = tl.dot(x, weights.to(tl.float16), sums)
    to = y_at + rows[:, None] * outputs + columns[None, :]
    if ADD:
        tl.atomic_add(to, sums.to(tl.float16), mask=rows[:, None] < batch, sem="relaxed")
    else:
        tl.store(to, sums.to(tl.float16), mask=rows[:, None] < batch)


class Weights:
    """Codes, scales and zeros of one matrix, and what each peer makes of them."""

    def __init__(self, outputs, inputs):
        self.outputs, self.inputs = outputs, inputs
        self.codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32, device="cuda")
        self.scales = torch.rand(inputs // GROUP, outputs, device="cuda").mul_(0.01).add_(0.005).half()
        self.zeros = torch.randint(6, 10, (inputs // GROUP, outputs), device="cuda").half()
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device="cuda")
        eights = self.codes.t().reshape(inputs // 8, 8, outputs)
        self.packed = (eights << shifts[None, :, None]).sum(1, dtype=torch.int64).to(torch.int32)

    def exact(self):
        codes = self.codes.double().reshape(self.outputs, -1, GROUP)
        scales, zeros = self.scales.double().t()[:, :, None], self.zeros.double().t()[:, :, None]
        return ((codes - zeros) * scales).reshape(self.outputs, self.inputs)

    def tinygemm(self):
        bytes_ = (self.codes[:, ::2] << 4 | self.codes[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(bytes_, 8)
        # Its weights are (code - 8) * scale + zero.
        zeros = (8 - self.zeros.float()) * self.scales.float()
        return packed, torch.stack((self.scales.float(), zeros), 2).bfloat16().contiguous()


def copies_of(tensors, room=700_000_000):
    """As many copies as do not fit into any cache."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return [[t.clone() for t in tensors] for _ in range(max(2, -(-room // size)))]


def time_us(copies, call, rounds=7):
    """Median over rounds of the time of a call, in a CUDA graph that goes through all copies."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for tensors in copies[:2]:
            call(*tensors)
        graph, calls = torch.cuda.CUDAGraph(), 0
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            while calls < 20:
                for tensors in copies:
                    call(*tensors)
                    calls += 1
        times = []
        for _ in range(rounds + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[1:])


def agree(name, got, exact, tolerance):
    error = ((got.double() - exact).norm() / exact.norm()).item()
    if not error < tolerance:
        sys.exit(f"{name}: relative error {error:.2e}")


def measure(outputs, inputs, batch):
    weights = Weights(outputs, inputs)
    exact_weights = weights.exact()
    x = torch.randn(batch, inputs, device="cuda", dtype=torch.float16)
    x16 = x.bfloat16()
    exact, exact16 = x.double() @ exact_weights.t(), x16.double() @ exact_weights.t()

    dense = exact_weights.bfloat16()
    y16 = torch.empty(batch, outputs, device="cuda", dtype=torch.bfloat16)
    del exact_weights
    cublas = time_us(copies_of([dense]), lambda w: torch.mm(x16, w.t(), out=y16))
    agree("cuBLAS", y16, exact16, 1e-2)

    packed, scales = weights.tinygemm()
    tiny = lambda w, s: torch.ops.aten._weight_int4pack_mm(x16, w, GROUP, s)
    agree("tinygemm", tiny(packed, scales), exact16, 2e-2)
    tinygemm = time_us(copies_of([packed, scales]), tiny)

    best = {}
    y = torch.empty(batch, outputs, device="cuda", dtype=torch.float16)
    copies = copies_of([weights.packed, weights.scales, weights.zeros])
    for columns, depth, warps, stages in CONFIGS:
        for splits in SPLITS:
            def call(codes, s, z):
                if splits > 1:
                    y.zero_()
                split_k[(outputs // columns, splits)](
                    x, codes, s, z, y, batch, outputs, inputs, splits, GROUP=GROUP, COLUMNS=columns, DEPTH=depth,
                    ADD=splits > 1, num_warps=warps, num_stages=stages)  # fmt: skip

            try:
                call(weights.packed, weights.scales, weights.zeros)
            except triton.runtime.errors.OutOfResources:
                continue
            agree(f"Triton {columns}x{depth} in {splits}", y, exact, 1e-2)
            us = time_us(copies, call, 3)
            key = splits > 1
            name = f"{columns}x{depth}, {warps} warps, {stages} stages, split {splits}"
            best[key] = min(best.get(key, (1e9,)), (us, name))
    print(
        f"{outputs}x{inputs} {batch} rows: cuBLAS bf16 {cublas:.1f} us, tinygemm {tinygemm:.1f}, Triton split "
        f"{best[True][0]:.1f} ({best[True][1]}), not split {best[False][0]:.1f} ({best[False][1]})",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,16", help="rows of activations, at most 16")
    parser.add_argument("--shape", default="4096x4096,14336x4096,28672x4096,4096x14336", help="outputs x inputs")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, "Triton", triton.__version__)
    torch.manual_seed(1)
    for shape in args.shape.split(","):
        outputs, inputs = map(int, shape.split("x"))
        for rows in args.rows.split(","):
            measure(outputs, inputs, int(rows))


if __name__ == "__main__":
    main()
