#!/usr/bin/env python3
"""llama.cpp on the same GGUF files, for the tables that compare with it.

    benches/llama_cpp.py [--avx2] [--threads N] [-p 128] [-n 32] [-r 3] FILE.gguf...

Builds llama-cpp-python from its source package into target/llama-cpp (a virtual environment; --avx2: another one, for AVX2
alone) unless that is there already, which takes ten minutes on two cores, and prints tokens a second for a prompt and
for generation, with llama.cpp's repacked weights and without, the best of each last. Nothing is installed elsewhere.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

VERSION = "0.3.36"
ROOT = Path(__file__).resolve().parent.parent


def build(avx2):
    """The Python of an environment with llama-cpp-python in it."""
    home = ROOT / "target" / ("llama-cpp-avx2" if avx2 else "llama-cpp")
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        print(f"building llama-cpp-python {VERSION} in {home}", file=sys.stderr)
        venv.create(home, with_pip=True, clear=True)
        flags = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"
        if avx2:
            flags = (
                "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON "
                "-DGGML_AVX512=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"
            )
        env = dict(os.environ, CMAKE_ARGS=flags)
        package = f"llama-cpp-python=={VERSION}"
        command = [python, "-m", "pip", "install", "--no-binary", "llama-cpp-python", "--no-cache-dir", package]
        subprocess.run(command, env=env, check=True)
        (home / "ready").touch()
    return python


def measure(args):
    """In the environment: times one file with one setting."""
    import ctypes

    # This file has the package's name, and its folder comes first.
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    import llama_cpp as c

    # Errors still come as return values.
    silent = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(silent, ctypes.c_void_p(0))
    c.llama_backend_init()
    params = c.llama_model_default_params()
    params.use_extra_bufts = args.repack
    model = c.llama_model_load_from_file(args.files[0].encode(), params)
    if not model:
        sys.exit(f"llama.cpp cannot load {args.files[0]}")
    params = c.llama_context_default_params()
    params.n_ctx = max(512, args.prompt + args.generate)
    params.n_batch = params.n_ubatch = max(args.prompt, 1)
    params.n_threads = params.n_threads_batch = args.threads
    context = c.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp cannot make a context")

    def decode(ids):
        tokens = (c.llama_token * len(ids))(*ids)
        if c.llama_decode(context, c.llama_batch_get_one(tokens, len(ids))) != 0:
            sys.exit("llama.cpp cannot decode")

    def run(batches, count):
        c.llama_memory_clear(c.llama_get_memory(context), True)
        start = time.perf_counter()
        for batch in batches:
            decode(batch)
        c.llama_synchronize(context)
        return count / (time.perf_counter() - start)

    # Ids that look random; times depend on how many there are only.
    ids = [(i * 2654435761 >> 7) % 1000 for i in range(max(args.prompt, args.generate))]
    prompt, single = [ids[: args.prompt]], [[i] for i in ids[: args.generate]]
    run(prompt, args.prompt)
    rates = [(run(prompt, args.prompt), run(single, args.generate)) for _ in range(args.repetitions)]
    print(*(statistics.median(rate) for rate in zip(*rates)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.gguf")
    parser.add_argument("--avx2", action="store_true", help="build for AVX2 and nothing newer")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("-p", "--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("-n", "--generate", type=int, default=32, help="tokens that are generated")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repack", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args)
    python = build(args.avx2)
    print(f"{'file':40} {'setting':10} {f'pp{args.prompt} tok/s':>14} {f'tg{args.generate} tok/s':>14}")
    for file in args.files:
        best = [0.0, 0.0]
        for setting in ["repack", "plain"]:
            own = ["--threads", args.threads, "-p", args.prompt, "-n", args.generate, "-r", args.repetitions]
            command = [python, __file__, "--measure", *(["--repack"] if setting == "repack" else []), *own, file]
            output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True)
            rates = [float(rate) for rate in output.stdout.split()]
            best = [max(pair) for pair in zip(best, rates)]
            print(f"{Path(file).name:40} {setting:10} {rates[0]:14.1f} {rates[1]:14.1f}", flush=True)
        print(f"{Path(file).name:40} {'best':10} {best[0]:14.1f} {best[1]:14.1f}", flush=True)


if __name__ == "__main__":
    main()
