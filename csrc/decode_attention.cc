#include "decode_attention.h"

#include "simd.h"
#include "vector_math.h"

namespace hav::HAV_ISA {
namespace {

constexpr int kQueriesAtOnce = 2;  // heads that share the loads of a key
constexpr int kKeysAtOnce = 4;     // that share the loads of queries
constexpr int kVectorsAtOnce = 4;  // of a value, in registers over all keys of a tile
constexpr float kNothingSeen = -1e30f;
constexpr int64_t kCacheLine = 64;  // bytes
// Head rows from which a second thread saves more than it costs.
constexpr int64_t kGrainHeads = 2;

// Positions of a tile at most, so that its keys and values stay in the first cache.
template <typename Element>
constexpr int kKeyTile = 256 / sizeof(Element);

HAV_INLINE F32 widened(const float* p) { return load(p); }
HAV_INLINE F32 widened(const uint16_t* p) { return load_bf16(p); }

void store_as(const float* from, int64_t size, float* to) { memcpy(to, from, size * sizeof *to); }
void store_as(const float* from, int64_t size, uint16_t* to) {
  for (int64_t i = 0; i < size; i += F32::kLanes) {
    store_bf16_up_to(to + i, load(from + i), F32::kLanes);
  }
}

// Pages lie apart from each other, so the processor cannot guess which lines come next.
template <typename Element>
HAV_INLINE void prefetch(const Element* p, int64_t size) {
  constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(Element));
  for (int64_t i = 0; i < size; i += kStep) __builtin_prefetch(p + i);
}

// A width that the compiler knows unrolls the loops over it.
template <int64_t kSize>
struct Known {
  HAV_INLINE constexpr operator int64_t() const { return kSize; }
};

// Keys and values of one head and one tile, by position. Element is float, or the bits of bfloat16.
template <typename Element>
struct Tile {
  const Element* keys[kKeyTile<Element>];  // in a last vector behind num_keys the last one's
  int64_t value_offset;
  int num_keys;
};

// What one task works on: a few query heads over one key head of one row.
struct Heads {
  const hav_kv_cache& cache;
  const int64_t* block_table;
  int64_t kv_head;
  int64_t num_positions;
  float scale;
};

template <typename Element>
Element* key_at(const Heads& heads, int64_t position) {
  const hav_kv_cache& cache = heads.cache;
  const int64_t block = heads.block_table[position / cache.block_size];
  return static_cast<Element*>(cache.keys) + block * cache.block_stride +
         heads.kv_head * cache.head_stride + position % cache.block_size * cache.position_stride;
}

// Positions of each tile but the last. Tiles of like size leave, while one is worked on, the time
// to fetch the next.
template <typename Element>
int64_t tile_size(int64_t num_positions) {
  const int64_t num_tiles = (num_positions + kKeyTile<Element> - 1) / kKeyTile<Element>;
  const int64_t size = (num_positions + num_tiles - 1) / num_tiles;
  return (size + F32::kLanes - 1) / F32::kLanes * F32::kLanes;
}

template <typename Element>
void find_tile(const Heads& heads, int64_t first, Tile<Element>* tile) {
  const hav_kv_cache& cache = heads.cache;
  const int64_t left = heads.num_positions - first;
  const int64_t size = tile_size<Element>(heads.num_positions);
  tile->num_keys = static_cast<int>(left < size ? left : size);
  tile->value_offset = cache.value_offset;
  const Element* key = nullptr;
  int64_t left_in_block = 0;
  for (int i = 0; i < tile->num_keys; ++i) {
    if (left_in_block == 0) {
      key = key_at<Element>(heads, first + i);
      left_in_block = cache.block_size - (first + i) % cache.block_size;
    }
    tile->keys[i] = key;
    key += cache.position_stride;
    --left_in_block;
  }
  for (int i = tile->num_keys; i % F32::kLanes != 0; ++i) tile->keys[i] = tile->keys[i - 1];
}

// Products of kNum queries with kKeysAtOnce keys, lane by lane: those of a query side by side,
// `stride` behind those of the query before.
template <int kNum, typename HeadDim, typename Element>
HAV_INLINE void multiply_lanes(const float* const* queries, const Element* const* keys,
                               HeadDim head_dim, F32* products, int64_t stride) {
  F32 sums[kNum][kKeysAtOnce];
  for (auto& of_query : sums) {
    for (F32& each : of_query) each = zero();
  }
  for (int64_t i = 0; i < head_dim; i += F32::kLanes) {
    F32 parts[kNum];
    for (int q = 0; q < kNum; ++q) parts[q] = load(queries[q] + i);
    for (int k = 0; k < kKeysAtOnce; ++k) {
      const F32 key = widened(keys[k] + i);
      for (int q = 0; q < kNum; ++q) sums[q][k] = fma(parts[q], key, sums[q][k]);
    }
  }
  for (int q = 0; q < kNum; ++q) {
    for (int k = 0; k < kKeysAtOnce; ++k) products[q * stride + k] = sums[q][k];
  }
}

// Running softmax of one query: what it has seen, relative to the largest score.
struct Running {
  float top = kNothingSeen;
  float total = 0.0f;
};

// Scores of queries against a tile; lanes beyond the last key repeat it. Fetches the values.
template <int kNum, typename HeadDim, typename Element>
HAV_INLINE void score_tile(const float* const* queries, const Tile<Element>& tile, HeadDim head_dim,
                           float scale, float (*scores)[kKeyTile<Element>]) {
  for (int first = 0; first < tile.num_keys; first += F32::kLanes) {
    F32 products[kNum][F32::kLanes];
    for (int lane = 0; lane < F32::kLanes; lane += kKeysAtOnce) {
      const Element* const* keys = tile.keys + first + lane;
      for (int k = 0; k < kKeysAtOnce; ++k) prefetch(keys[k] + tile.value_offset, head_dim);
      multiply_lanes<kNum>(queries, keys, head_dim, &products[0][lane], F32::kLanes);
    }
    for (int q = 0; q < kNum; ++q) {
      store(scores[q] + first, sums_of(products[q]) * splat(scale));
    }
  }
}

// Turns scores into weights, 0 beyond the last key; returns the factor for what was seen before.
float weigh_tile(float* scores, int num_keys, Running& running) {
  F32 most = splat(running.top);
  for (int i = 0; i < num_keys; i += F32::kLanes) most = max(most, load(scores + i));
  const float top = max_of(most);
  F32 total = zero();
  for (int i = 0; i < num_keys; i += F32::kLanes) {
    store(scores + i, exp_of(load(scores + i) - splat(top)));
    total = total + load_up_to(scores + i, num_keys - i);
  }
  float earlier[F32::kLanes];
  store(earlier, exp_of(splat(running.top - top)));
  running.total = running.total * earlier[0] + sum(total);
  running.top = top;
  return earlier[0];
}

// context = context * earlier + weights * values, for kNum queries and some vectors of the values.
// Fetches the keys of the next tile.
template <int kNum, int kVectors, typename Element>
HAV_INLINE void add_values(const Tile<Element>& tile, const Tile<Element>& next,
                           const float (*weights)[kKeyTile<Element>], const float* earlier,
                           int64_t offset, float* const* context) {
  F32 sums[kNum][kVectors];
  for (int q = 0; q < kNum; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      sums[q][v] = load(context[q] + offset + v * F32::kLanes) * splat(earlier[q]);
    }
  }
  for (int i = 0; i < tile.num_keys; ++i) {
    if (i < next.num_keys) prefetch(next.keys[i] + offset, kVectors * F32::kLanes);
    const Element* value = tile.keys[i] + tile.value_offset + offset;
    for (int v = 0; v < kVectors; ++v) {
      const F32 part = widened(value + v * F32::kLanes);
      for (int q = 0; q < kNum; ++q) sums[q][v] = fma(splat(weights[q][i]), part, sums[q][v]);
    }
  }
  for (int q = 0; q < kNum; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      store(context[q] + offset + v * F32::kLanes, sums[q][v]);
    }
  }
}

template <int kNum, typename HeadDim, typename Element>
HAV_INLINE void add_tile(const Tile<Element>& tile, const Tile<Element>& next,
                         const float (*weights)[kKeyTile<Element>], const float* earlier,
                         HeadDim head_dim, float* const* context) {
  constexpr int64_t kWide = kVectorsAtOnce * F32::kLanes;
  int64_t offset = 0;
  for (; offset + kWide <= head_dim; offset += kWide) {
    add_values<kNum, kVectorsAtOnce>(tile, next, weights, earlier, offset, context);
  }
  for (; offset < head_dim; offset += F32::kLanes) {
    add_values<kNum, 1>(tile, next, weights, earlier, offset, context);
  }
  for (int i = tile.num_keys; i < next.num_keys; ++i) prefetch(next.keys[i], head_dim);
}

// `first` is the first tile of these heads, `after` what is read next when they are done.
template <int kNum, typename HeadDim, typename Element>
void attend_heads(const Heads& heads, HeadDim head_dim, const Tile<Element>& first,
                  const Tile<Element>& after, const float* const* queries, float* const* context) {
  Running running[kNum];
  float weights[kNum][kKeyTile<Element>];
  float earlier[kNum];
  Tile<Element> found[2];
  const Tile<Element>* tile = &first;
  for (int q = 0; q < kNum; ++q) memset(context[q], 0, head_dim * sizeof(float));
  int64_t end = first.num_keys;
  for (int spare = 0;; spare = 1 - spare) {
    const Tile<Element>* next = &after;
    if (end < heads.num_positions) {
      find_tile(heads, end, &found[spare]);
      next = &found[spare];
      end += next->num_keys;
    }
    score_tile<kNum>(queries, *tile, head_dim, heads.scale, weights);
    for (int q = 0; q < kNum; ++q) {
      earlier[q] = weigh_tile(weights[q], tile->num_keys, running[q]);
    }
    add_tile<kNum>(*tile, *next, weights, earlier, head_dim, context);
    if (next == &after) break;
    tile = next;
  }
  for (int q = 0; q < kNum; ++q) {
    const F32 factor = splat(1.0f / running[q].total);
    for (int64_t i = 0; i < head_dim; i += F32::kLanes) {
      store(context[q] + i, load(context[q] + i) * factor);
    }
  }
}

// All query heads that share a key head; queries and context are those of the first.
template <typename HeadDim, typename Element>
void attend_group(const Heads& heads, HeadDim head_dim, const Tile<Element>& first,
                  const Tile<Element>& after, int64_t num_queries, const float* queries,
                  float* context) {
  int64_t q = 0;
  for (; q + kQueriesAtOnce <= num_queries; q += kQueriesAtOnce) {
    const float* const pair[] = {queries + q * head_dim, queries + (q + 1) * head_dim};
    float* const results[] = {context + q * head_dim, context + (q + 1) * head_dim};
    attend_heads<kQueriesAtOnce>(heads, head_dim, first, after, pair, results);
  }
  for (; q < num_queries; ++q) {
    const float* const one[] = {queries + q * head_dim};
    float* const result[] = {context + q * head_dim};
    attend_heads<1>(heads, head_dim, first, after, one, result);
  }
}

template <typename Element>
void attend_group_of_any_width(const Heads& heads, const Tile<Element>& first,
                               const Tile<Element>& after, int64_t num_queries,
                               const float* queries, float* context) {
  switch (heads.cache.head_dim) {
    case 64:
      return attend_group(heads, Known<64>{}, first, after, num_queries, queries, context);
    case 128:
      return attend_group(heads, Known<128>{}, first, after, num_queries, queries, context);
    default:
      return attend_group(heads, heads.cache.head_dim, first, after, num_queries, queries, context);
  }
}

Heads heads_of(const hav_kv_cache& cache, const hav_attention& attention, int64_t row,
               int64_t kv_head) {
  const int64_t table = attention.tables[row];
  return {cache, attention.block_tables + table * attention.block_table_stride, kv_head,
          attention.positions[row] + 1, attention.scale};
}

// Rotates the two halves of a head, in place.
void rotate(const float* cos, const float* signed_sin, float* head, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = head[i], high = head[i + half];
    head[i] = low * cos[i] + high * signed_sin[i];
    head[i + half] = high * cos[i + half] + low * signed_sin[i + half];
  }
}

template <typename Element>
void write_key_value(const Heads& heads, const float* key, const float* value) {
  Element* to = key_at<Element>(heads, heads.num_positions - 1);
  store_as(key, heads.cache.head_dim, to);
  store_as(value, heads.cache.head_dim, to + heads.cache.value_offset);
}

// A parallel region: prepare(row, kv_head, heads) and then attention, row by row and head by head,
// where each task fetches what the next one reads first.
template <typename Element, typename Prepare>
void attend_all(ThreadPool* pool, const hav_kv_cache& cache, const hav_attention& attention,
                const float* queries, int64_t query_stride, float* context, int64_t context_stride,
                const Prepare& prepare) {
  const int64_t num_kv_heads = cache.num_kv_heads;
  const int64_t group = attention.num_heads / num_kv_heads;
  const int64_t group_size = group * cache.head_dim;
  const int64_t num_tasks = attention.num_rows * num_kv_heads;
  parallel_for(pool, num_tasks, kGrainHeads, [&](int64_t begin, int64_t end) {
    Tile<Element> tiles[2];
    find_tile(heads_of(cache, attention, begin / num_kv_heads, begin % num_kv_heads), 0,
              &tiles[begin % 2]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / num_kv_heads, kv_head = task % num_kv_heads;
      const Heads heads = heads_of(cache, attention, row, kv_head);
      Tile<Element>& after = tiles[(task + 1) % 2];
      after.num_keys = 0;
      if (task + 1 < end) {
        find_tile(heads_of(cache, attention, (task + 1) / num_kv_heads, (task + 1) % num_kv_heads),
                  0, &after);
      }
      prepare(row, kv_head, heads);
      attend_group_of_any_width(heads, tiles[task % 2], after, group,
                                queries + row * query_stride + kv_head * group_size,
                                context + row * context_stride + kv_head * group_size);
    }
  });
}

template <typename Element>
void rope_write_attend_in(ThreadPool* pool, const hav_kv_cache& cache,
                          const hav_attention& attention, const float* cos, const float* signed_sin,
                          float* qkv, int64_t qkv_stride, float* context, int64_t context_stride) {
  const int64_t num_kv_heads = cache.num_kv_heads, head_dim = cache.head_dim;
  const int64_t group = attention.num_heads / num_kv_heads;
  const auto rotate_and_write = [&](int64_t row, int64_t kv_head, const Heads& heads) {
    float* queries = qkv + row * qkv_stride + kv_head * group * head_dim;
    float* key = qkv + row * qkv_stride + (attention.num_heads + kv_head) * head_dim;
    const int64_t angle = attention.positions[row] * head_dim;
    for (int64_t q = 0; q < group; ++q) {
      rotate(cos + angle, signed_sin + angle, queries + q * head_dim, head_dim);
    }
    rotate(cos + angle, signed_sin + angle, key, head_dim);
    write_key_value<Element>(heads, key, key + num_kv_heads * head_dim);
  };
  attend_all<Element>(pool, cache, attention, qkv, qkv_stride, context, context_stride,
                      rotate_and_write);
}

}  // namespace

void attend_rows(ThreadPool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                 const float* queries, int64_t query_stride, float* context,
                 int64_t context_stride) {
  const auto nothing = [](int64_t, int64_t, const Heads&) {};
  const auto attend = cache->format == HAV_BFLOAT16 ? attend_all<uint16_t, decltype(nothing)>
                                                    : attend_all<float, decltype(nothing)>;
  attend(pool, *cache, *attention, queries, query_stride, context, context_stride, nothing);
}

void rope_write_attend(ThreadPool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                       const float* cos, const float* signed_sin, float* qkv, int64_t qkv_stride,
                       float* context, int64_t context_stride) {
  const auto attend =
      cache->format == HAV_BFLOAT16 ? rope_write_attend_in<uint16_t> : rope_write_attend_in<float>;
  attend(pool, *cache, *attention, cos, signed_sin, qkv, qkv_stride, context, context_stride);
}

}  // namespace hav::HAV_ISA
