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
#define HAV_ABI_VERSION 2

// HAV_ABI_VERSION of the library that is loaded.
HAV_API int32_t hav_abi_version(void);

// ---- Instruction sets -------------------------------------------------------------------------

// Names of the instruction sets that were compiled in and that this processor has, best last,
// separated by blanks: some of "baseline avx2 avx512", or on Arm of "baseline neon".
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

// Sum over codebooks of one row of a table each: code c of codebook k has row k * codebook_size +
// c.
//   table  [num_codebooks * codebook_size, width]
//   codes  [num_rows, num_codebooks] with stride codes_stride
//   y      [num_rows, width] with stride y_stride
HAV_API void hav_embed_codes(hav_pool* pool, const float* table, int64_t width,
                             const int64_t* codes, int64_t codes_stride, int64_t num_codebooks,
                             int64_t codebook_size, float* y, int64_t y_stride, int64_t num_rows);

// ---- Linear maps ------------------------------------------------------------------------------

// Number formats of weights.
#define HAV_FLOAT32 0   // numbers that are all bfloat16 are held in half the memory, as exactly
#define HAV_BFLOAT16 1  // inputs are rounded to bfloat16 too
#define HAV_INT8 2      // one scale per output; inputs become int8 with one scale per row
#define HAV_INT4 3      // one scale per output and 32 inputs; inputs as for HAV_INT8

// A matrix [num_outputs, num_inputs] packed for the instruction set that was in use.
typedef struct hav_linear hav_linear;

// Packs a copy. NULL when there is no memory, or a size or format is not allowed.
//   values       row-major, value_stride bytes from row to row. A row is num_inputs float, bfloat16
//                or int8, or num_inputs / 2 bytes that hold two int4 each: the even input in the
//                low half, plus 8. num_inputs of HAV_INT4 is a multiple of 32.
//   scales       HAV_INT8: float [num_outputs]; HAV_INT4: bfloat16 [num_outputs, num_inputs / 32];
//                otherwise NULL. A weight is its integer times its scale.
//   is_gated     nonzero: the first half of the rows are gates and the second half ups, and
//                silu(gate) * up comes out, num_outputs / 2 numbers
HAV_API hav_linear* hav_linear_create(hav_pool* pool, int32_t format, int64_t num_outputs,
                                      int64_t num_inputs, const void* values, int64_t value_stride,
                                      const void* scales, int32_t is_gated);

// NULL is allowed.
HAV_API void hav_linear_destroy(hav_linear* weights);

// Bytes of the packed matrix, what a product reads.
HAV_API int64_t hav_linear_num_bytes(const hav_linear* weights);

// y[r] = W x[r] for each row, or y[r] += W x[r] where is_added is not 0.
//   x            [num_rows, num_inputs] with stride x_stride
//   norm_weight  [num_inputs], the gain of an RMS norm of eps norm_eps that rows go through first;
//                or NULL for none
//   y            [num_rows, outputs] with stride y_stride; must not overlap x
// Returns 0, or -1 when there is no memory for the work.
HAV_API int32_t hav_linear_apply(hav_pool* pool, const hav_linear* weights, const float* x,
                                 int64_t x_stride, int64_t num_rows, const float* norm_weight,
                                 float norm_eps, float* y, int64_t y_stride, int32_t is_added);

// ---- Paged attention --------------------------------------------------------------------------

// The KV cache of one layer, float32 or bfloat16. Position p of a sequence lies in block table[p /
// block_size], at offset p % block_size; keys + block * block_stride + head * head_stride + offset
// * position_stride is its key, and its value lies value_offset behind that. The head_dim elements
// of a key are contiguous, and so are those of a value.
typedef struct {
  void* keys;
  int64_t value_offset, block_stride, head_stride, position_stride;
  int64_t block_size, num_kv_heads;
  int64_t head_dim;  // a multiple of 16
  int32_t format;    // HAV_FLOAT32, or HAV_BFLOAT16: rounded when written, computed with as float
} hav_kv_cache;

// Which positions the rows of a step see. Row r sees 0 .. positions[r] of the sequence whose block
// table is row tables[r] of block_tables. What lies in blocks beyond is never read.
typedef struct {
  const int64_t* block_tables;  // stride block_table_stride
  int64_t block_table_stride;
  const int64_t* tables;     // [num_rows]
  const int64_t* positions;  // [num_rows]
  int64_t num_rows;
  int64_t num_heads;  // of queries; a multiple of num_kv_heads
  float scale;        // of the scores
} hav_attention;

// Softmax attention, for a decode step (one row of each sequence) as well as a prefill (many rows).
//   queries  [num_rows, num_heads * head_dim] with stride query_stride
//   context  the same shape with stride context_stride; must not be queries
HAV_API void hav_attend_rows(hav_pool* pool, const hav_kv_cache* cache,
                             const hav_attention* attention, const float* queries,
                             int64_t query_stride, float* context, int64_t context_stride);

// A decode step's attention with all that comes before it: rotates queries and keys, writes keys
// and values to their pages, then attends. No two rows may share a sequence.
//   cos, signed_sin  [num_positions, head_dim]; the first half of the sines is negated
//   qkv              [num_rows, (num_heads + 2 * num_kv_heads) * head_dim]: queries, keys, values;
//                    queries and keys are rotated in place
HAV_API void hav_rope_write_attend(hav_pool* pool, const hav_kv_cache* cache,
                                   const hav_attention* attention, const float* cos,
                                   const float* signed_sin, float* qkv, int64_t qkv_stride,
                                   float* context, int64_t context_stride);

// ---- Sampling ---------------------------------------------------------------------------------

#define HAV_MAX_CODEBOOK_SIZE 4096

// Streams of codes of persistent rows, in the memory of CodebookState.
typedef struct {
  int64_t* last_frame;  // [max_num_rows, num_codebooks]
  int64_t* counters;    // [max_num_rows, 6]
  int16_t* history;     // [max_num_rows, 64, num_codebooks]
  int64_t num_codebooks;
  int64_t codebook_size;  // BOS and EOS included; at most HAV_MAX_CODEBOOK_SIZE
  int64_t bos, eos;
} hav_streams;

// Settings of persistent rows, each [max_num_rows], in the memory of RowSettings.
typedef struct {
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const uint64_t* seed;
  const int64_t* ras_window;
  const int64_t* ras_repeats;
  const uint8_t* ras_blocks;
} hav_sampling;

// Draws one frame for each of `rows` [num_rows] and appends it to the row's stream.
//   logits  [num_rows, num_codebooks * codebook_size], overwritten
//   frames  [num_rows, num_codebooks]
//   status  [num_rows]: 0 running, 1 ended by EOS, 2 frame limit
HAV_API void hav_sample_frames(hav_pool* pool, const hav_streams* streams,
                               const hav_sampling* sampling, const int64_t* rows, int64_t num_rows,
                               float* logits, int16_t* frames, uint8_t* status);

// Philox numbers in [0, 1): numbers [num_rows, num_codebooks] of (seed, step, codebook, purpose).
HAV_API void hav_uniform(const uint64_t* seeds, const int64_t* steps, int64_t num_rows,
                         int64_t num_codebooks, uint32_t purpose, float* numbers);

// ---- A decode step ----------------------------------------------------------------------------

// One decoder layer: x += output(attention(norm(x))), then x += down(silu(gate) * up of norm(x)).
typedef struct {
  const float* input_norm;  // [hidden_size]
  const float* post_norm;   // [hidden_size]
  const hav_linear* qkv;    // queries, keys and values side by side
  const hav_linear* output;
  const hav_linear* gate_up;  // gated
  const hav_linear* down;
  hav_kv_cache cache;
} hav_decoder_layer;

// A decoder that feeds its own codes back, and where its rows are kept. All matrices were packed
// for one instruction set, which computes the step.
typedef struct {
  int64_t num_layers;
  const hav_decoder_layer* layers;
  int64_t hidden_size, num_heads;
  float norm_eps;
  const float* embedding;       // [num_codebooks * codebook_size, hidden_size]
  const float* cos;             // [max_num_positions, head_dim]
  const float* signed_sin;      // [max_num_positions, head_dim]
  const float* norm;            // [hidden_size]
  const hav_linear* head;       // to [num_codebooks * codebook_size]
  const int64_t* block_tables;  // of persistent rows, stride block_table_stride
  int64_t block_table_stride;
  const int64_t* positions;  // [max_num_rows], where the last frame of each row goes
  hav_streams streams;
  hav_sampling sampling;
} hav_decoder;

// Embeds the last frame of each of `rows` [num_rows], writes its keys and values to the cache, and
// draws the next frame, which becomes the row's last. Positions are left as they are.
//   frames  [num_rows, num_codebooks]
//   status  [num_rows], as of hav_sample_frames
// Returns 0, or -1 when there is no memory for the work; then nothing has changed.
HAV_API int32_t hav_decode_step(hav_pool* pool, const hav_decoder* decoder, const int64_t* rows,
                                int64_t num_rows, int16_t* frames, uint8_t* status);

// ---- Codes to samples -------------------------------------------------------------------------

// One convolution over time: outputs = W taps of inputs + bias, rows before the first and after the
// last being zeros, so that it has as many rows out as in, or `upsampling` times as many.
typedef struct {
  // [num_outputs, num_inputs, kernel_size], of an upsampling one [num_inputs, num_outputs,
  // kernel_size].
  const float* weight;
  const float* bias;  // [num_outputs]
  int64_t num_outputs, num_inputs;
  int64_t kernel_size;  // odd; of an upsampling one, 2 * upsampling
  int64_t dilation;     // rows between taps; an upsampling one has none
  int64_t upsampling;   // 0: none; s: transposed with stride s, padding ceil(s / 2)
  // Inputs go through a Snake first, x + sin(alpha x)^2 * inverse, or NULL for none: [num_inputs].
  const float* alpha;
  const float* inverse;
  // Adds what went into the layer before, ahead of its Snake; that layer is no residual one itself.
  int32_t is_residual;
} hav_wave_layer;

// The first layer has no Snake, and what goes into it is no residual; the last has one output.
typedef struct {
  const float* table;       // [num_codebooks * codebook_size, width], used as long as the decoder
  const float* table_bias;  // [width], the same
  int64_t num_codebooks, codebook_size, width;
  int64_t num_layers;
  const hav_wave_layer* layers;
} hav_wave_model;

// Layers packed for the instruction set that was in use.
typedef struct hav_wave_decoder hav_wave_decoder;

// Packs a copy of the layers. NULL when they are no such chain, or there is no memory.
HAV_API hav_wave_decoder* hav_wave_decoder_create(const hav_wave_model* model);

// NULL is allowed.
HAV_API void hav_wave_decoder_destroy(hav_wave_decoder* decoder);

// Bytes of the packed layers.
HAV_API int64_t hav_wave_decoder_num_bytes(const hav_wave_decoder* decoder);

// Samples of frames first_frame .. last_frame - 1, to the bit as in a decode of all num_frames, and
// without computing what they do not depend on.
//   codes    [num_codebooks, num_frames] with stride codes_stride, each below codebook_size
//   samples  [(last_frame - first_frame) * product of the upsamplings], from -1 to 1
// Returns 0, or -1 when there is no memory for the work.
HAV_API int32_t hav_wave_decode(hav_pool* pool, const hav_wave_decoder* decoder,
                                const int64_t* codes, int64_t codes_stride, int64_t num_frames,
                                int64_t first_frame, int64_t last_frame, float* samples);

#ifdef __cplusplus
}
#endif

#endif  // HAV_API_H_
