// The parts of other kernels that latent.cpp is made of. Included once per instruction set by foreach_isa.h; no include
// guard.
#include "linear_kernel.h"
#include "rotary_kernel.h"
