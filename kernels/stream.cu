// Products of layout `fixed` with some columns of activations (stream.cuh).
#include "stream_entry.cuh"

using namespace taper;

STREAM(fixed, Fixed, 32, 4)
STREAM(fixed, Fixed, 64, 4)
