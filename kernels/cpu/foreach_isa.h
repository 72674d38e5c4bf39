// Compiles the header named by INFER_KERNEL once per instruction set, each in a namespace of its own (the scheme is
// Highway's): infer::portable (128-bit vectors: SSE2 or NEON), and on x86-64 also infer::avx2 and infer::avx512.
// INFER_SELECT picks one at run time.
//
// Every function of such a header carries INFER_TARGET (INFER_INLINE includes it): GCC splits vectors wider than the
// function's own target before it inlines, so that a helper without the attribute would be slow in all builds.
// Lambdas do not inherit the attribute: write none there.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INFER_INLINE INFER_TARGET inline __attribute__((always_inline))

#if defined(__x86_64__)
#define INFER_ISA avx512
#define INFER_WIDTH 16
#define INFER_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "simd.h"
#include INFER_KERNEL
#undef INFER_ISA
#undef INFER_WIDTH
#undef INFER_TARGET

#define INFER_ISA avx2
#define INFER_WIDTH 8
#define INFER_TARGET __attribute__((target("avx2,fma")))
#include "simd.h"
#include INFER_KERNEL
#undef INFER_ISA
#undef INFER_WIDTH
#undef INFER_TARGET
#endif

#define INFER_ISA portable
#define INFER_WIDTH 4
#define INFER_TARGET
#include "simd.h"
#include INFER_KERNEL
#undef INFER_ISA
#undef INFER_WIDTH
#undef INFER_TARGET
