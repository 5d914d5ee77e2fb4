// The C interface of the native library: all that Python, or anything else, may call.
//
// Conventions. Pointers are to memory of the caller unless a function is named *_create; sizes and
// strides count elements, not bytes. "Row-major [R, C] with stride s" means that element (r, c)
// lies at r * s + c. No function throws, reads the environment or keeps a pointer after it returns,
// except where its comment says so. No function needs Python's interpreter lock.
//
// Every function that computes takes a pool, or NULL to compute on the calling thread alone. What
// it computes never depends on the number of threads, and what it computes for one row never
// depends on the other rows.
#ifndef HAV_API_H_
#define HAV_API_H_

#include <stdint.h>

#define HAV_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Raised by every change to this file that an older caller would get wrong.
#define HAV_ABI_VERSION 1

// HAV_ABI_VERSION of the library that is loaded.
HAV_API int32_t hav_abi_version(void);

// ---- Instruction sets -------------------------------------------------------------------------

// Names of the instruction sets that were compiled in and that this processor has, best last,
// separated by blanks: some of "baseline avx2 avx512" or "neon".
HAV_API const char* hav_supported_isas(void);

// Name of the instruction set in use; at first the last of hav_supported_isas().
HAV_API const char* hav_isa(void);

// Use the instruction set of this name from now on, in the whole process. Packed weights keep the
// one that they were made with. Returns 0, or -1 when it is not among the supported ones.
HAV_API int32_t hav_select_isa(const char* name);

// ---- Threads ----------------------------------------------------------------------------------

// A set of threads that compute together with the thread that calls.
typedef struct hav_pool hav_pool;

// A pool of num_threads >= 1 threads, the calling one included. NULL when they cannot be had. One
// thread at a time should call with a pool; a second one is served too, but computes alone.
HAV_API hav_pool* hav_pool_create(int32_t num_threads);

// Ends the threads of a pool that nobody calls with any more; NULL is allowed.
HAV_API void hav_pool_destroy(hav_pool* pool);

// Threads of a pool; 1 for NULL.
HAV_API int32_t hav_pool_num_threads(const hav_pool* pool);

// ---- Row operations ---------------------------------------------------------------------------

// Root-mean-square norm: y[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * weight[i].
//   x        [num_rows, width] with stride x_stride
//   weight   [width]
//   y        [num_rows, width] with stride y_stride; may be x itself
HAV_API void hav_rms_norm(hav_pool* pool, const float* x, int64_t x_stride, const float* weight,
                          float eps, float* y, int64_t y_stride, int64_t num_rows, int64_t width);

#ifdef __cplusplus
}
#endif

#endif  // HAV_API_H_
