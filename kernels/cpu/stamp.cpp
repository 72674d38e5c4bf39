// What infer/ops.py reads in the file before it loads it: a library of another torch must not be loaded.
#include <torch/version.h>

extern "C" __attribute__((used, visibility("default"))) const char infer_kernels_stamp[] =
    "infer-kernels torch=" TORCH_VERSION;
