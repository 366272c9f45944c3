"""Sizes and speeds of other lossless coders on one tensor, on one thread: for the README's comparison.

    pip install zipnn zstandard
    python benches/peers.py FILE.safetensors TENSOR
"""

import json
import struct
import sys
import time


def tensor(path, name):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + start)
        return file.read(end - start)


def measure(name, data, compress, decompress):
    """Best of five, as other work on the machine only ever slows a run down."""
    times = [[], []]
    for _ in range(5):
        # ZipNN reorders its input in place.
        source = bytearray(data)
        begin = time.perf_counter()
        packed = compress(source)
        middle = time.perf_counter()
        unpacked = decompress(packed)
        times[0].append(middle - begin)
        times[1].append(time.perf_counter() - middle)
        assert bytes(unpacked) == data
    bits = 16 * len(packed) / len(data)
    rates = [len(data) / 1e6 / min(t) for t in times]
    print(f"{name}: {bits:.2f} bits a BF16 weight, compress {rates[0]:.0f} MB/s, decompress {rates[1]:.0f} MB/s")


def main():
    import zstandard
    from zipnn import ZipNN

    data = tensor(*sys.argv[1:3])
    zipnn = ZipNN(bytearray_dtype="bfloat16", input_format="byte", threads=1)
    measure("zipnn", data, zipnn.compress, zipnn.decompress)
    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    measure("zstd -3", data, lambda d: compressor.compress(bytes(d)), decompressor.decompress)


main()
