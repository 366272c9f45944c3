// Products of layout `fixed` with some columns of activations (stream.cuh).
#include "stream_entry.cuh"

using namespace taper;

STREAMS(fixed, Fixed)
