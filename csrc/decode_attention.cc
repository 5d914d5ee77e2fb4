#include "decode_attention.h"

#include "simd.h"
#include "vector_math.h"

namespace hav::HAV_ISA {
namespace {

constexpr int kKeyTile = 64;       // positions; tiles start at multiples of it
constexpr int kQueriesAtOnce = 2;  // heads that share the loads of a key
constexpr int kVectorsAtOnce = 4;  // of a value, in registers over all keys of a tile
constexpr float kNothingSeen = -1e30f;
// Head rows from which a second thread saves more than it costs.
constexpr int64_t kGrainHeads = 2;

// Keys and values of one head and one tile, by position.
struct Tile {
  const float* keys[kKeyTile];
  int64_t value_offset;
  int num_keys;
};

const float* key_at(const hav_kv_cache& cache, const int64_t* block_table, int64_t kv_head,
                    int64_t position) {
  const int64_t block = block_table[position / cache.block_size];
  return cache.keys + block * cache.block_stride + kv_head * cache.head_stride +
         position % cache.block_size * cache.position_stride;
}

Tile tile_at(const hav_kv_cache& cache, const int64_t* block_table, int64_t kv_head, int64_t first,
             int64_t num_positions) {
  Tile tile;
  const int64_t left = num_positions - first;
  tile.num_keys = static_cast<int>(left < kKeyTile ? left : kKeyTile);
  tile.value_offset = cache.value_offset;
  const float* key = nullptr;
  int64_t left_in_block = 0;
  for (int i = 0; i < tile.num_keys; ++i) {
    if (left_in_block == 0) {
      key = key_at(cache, block_table, kv_head, first + i);
      left_in_block = cache.block_size - (first + i) % cache.block_size;
    }
    tile.keys[i] = key;
    key += cache.position_stride;
    --left_in_block;
  }
  return tile;
}

F32 dot_lanes(const float* a, const float* b, int64_t size) {
  F32 sum = load(a) * load(b);
  for (int64_t i = F32::kLanes; i < size; i += F32::kLanes)
    sum = fma(load(a + i), load(b + i), sum);
  return sum;
}

// Running softmax of one query: what it has seen, relative to the largest score.
struct Running {
  float top = kNothingSeen;
  float total = 0.0f;
};

// Scores of a query against a tile, [kKeyTile]; lanes beyond the last key repeat it.
void score_tile(const float* query, const Tile& tile, int64_t head_dim, float scale,
                float* scores) {
  for (int first = 0; first < tile.num_keys; first += F32::kLanes) {
    F32 products[F32::kLanes];
    for (int lane = 0; lane < F32::kLanes; ++lane) {
      const int i = first + lane < tile.num_keys ? first + lane : tile.num_keys - 1;
      products[lane] = dot_lanes(query, tile.keys[i], head_dim);
    }
    store(scores + first, sums_of(products) * splat(scale));
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
template <int kNum, int kVectors>
HAV_INLINE void add_values(const Tile& tile, const float (*weights)[kKeyTile], const float* earlier,
                           int64_t offset, float* const* context) {
  F32 sums[kNum][kVectors];
  for (int q = 0; q < kNum; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      sums[q][v] = load(context[q] + offset + v * F32::kLanes) * splat(earlier[q]);
    }
  }
  for (int i = 0; i < tile.num_keys; ++i) {
    const float* value = tile.keys[i] + tile.value_offset + offset;
    for (int v = 0; v < kVectors; ++v) {
      const F32 part = load(value + v * F32::kLanes);
      for (int q = 0; q < kNum; ++q) sums[q][v] = fma(splat(weights[q][i]), part, sums[q][v]);
    }
  }
  for (int q = 0; q < kNum; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      store(context[q] + offset + v * F32::kLanes, sums[q][v]);
    }
  }
}

template <int kNum>
void add_tile(const Tile& tile, const float (*weights)[kKeyTile], const float* earlier,
              int64_t head_dim, float* const* context) {
  constexpr int64_t kWide = kVectorsAtOnce * F32::kLanes;
  int64_t offset = 0;
  for (; offset + kWide <= head_dim; offset += kWide) {
    add_values<kNum, kVectorsAtOnce>(tile, weights, earlier, offset, context);
  }
  for (; offset < head_dim; offset += F32::kLanes) {
    add_values<kNum, 1>(tile, weights, earlier, offset, context);
  }
}

// What one task works on: a few query heads over one key head of one row.
struct Heads {
  const hav_kv_cache& cache;
  const int64_t* block_table;
  int64_t kv_head;
  int64_t num_positions;
  float scale;
};

template <int kNum>
void attend_heads(const Heads& heads, const float* const* queries, float* const* context) {
  const int64_t head_dim = heads.cache.head_dim;
  Running running[kNum];
  float weights[kNum][kKeyTile];
  float earlier[kNum];
  for (int q = 0; q < kNum; ++q) memset(context[q], 0, head_dim * sizeof(float));
  for (int64_t first = 0; first < heads.num_positions; first += kKeyTile) {
    const Tile tile =
        tile_at(heads.cache, heads.block_table, heads.kv_head, first, heads.num_positions);
    for (int q = 0; q < kNum; ++q) {
      score_tile(queries[q], tile, head_dim, heads.scale, weights[q]);
      earlier[q] = weigh_tile(weights[q], tile.num_keys, running[q]);
    }
    add_tile<kNum>(tile, weights, earlier, head_dim, context);
  }
  for (int q = 0; q < kNum; ++q) {
    const F32 factor = splat(1.0f / running[q].total);
    for (int64_t i = 0; i < head_dim; i += F32::kLanes) {
      store(context[q] + i, load(context[q] + i) * factor);
    }
  }
}

// All query heads that share a key head; queries and context are those of the first.
void attend_group(const Heads& heads, int64_t num_queries, const float* queries, float* context) {
  const int64_t head_dim = heads.cache.head_dim;
  int64_t q = 0;
  for (; q + kQueriesAtOnce <= num_queries; q += kQueriesAtOnce) {
    const float* const pair[] = {queries + q * head_dim, queries + (q + 1) * head_dim};
    float* const results[] = {context + q * head_dim, context + (q + 1) * head_dim};
    attend_heads<kQueriesAtOnce>(heads, pair, results);
  }
  for (; q < num_queries; ++q) {
    const float* const one[] = {queries + q * head_dim};
    float* const result[] = {context + q * head_dim};
    attend_heads<1>(heads, one, result);
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

void write_key_value(const Heads& heads, const float* key, const float* value) {
  const hav_kv_cache& cache = heads.cache;
  float* to =
      const_cast<float*>(key_at(cache, heads.block_table, heads.kv_head, heads.num_positions - 1));
  memcpy(to, key, cache.head_dim * sizeof(float));
  memcpy(to + cache.value_offset, value, cache.head_dim * sizeof(float));
}

}  // namespace

void attend_rows(ThreadPool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                 const float* queries, int64_t query_stride, float* context,
                 int64_t context_stride) {
  const int64_t num_kv_heads = cache->num_kv_heads;
  const int64_t group = attention->num_heads / num_kv_heads;
  const int64_t group_size = group * cache->head_dim;
  const int64_t num_tasks = attention->num_rows * num_kv_heads;
  parallel_for(pool, num_tasks, kGrainHeads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / num_kv_heads, kv_head = task % num_kv_heads;
      attend_group(heads_of(*cache, *attention, row, kv_head), group,
                   queries + row * query_stride + kv_head * group_size,
                   context + row * context_stride + kv_head * group_size);
    }
  });
}

void rope_write_attend(ThreadPool* pool, const hav_kv_cache* cache, const hav_attention* attention,
                       const float* cos, const float* signed_sin, float* qkv, int64_t qkv_stride,
                       float* context, int64_t context_stride) {
  const int64_t num_kv_heads = cache->num_kv_heads, head_dim = cache->head_dim;
  const int64_t group = attention->num_heads / num_kv_heads;
  const int64_t num_tasks = attention->num_rows * num_kv_heads;
  parallel_for(pool, num_tasks, kGrainHeads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / num_kv_heads, kv_head = task % num_kv_heads;
      const Heads heads = heads_of(*cache, *attention, row, kv_head);
      float* queries = qkv + row * qkv_stride + kv_head * group * head_dim;
      float* key = qkv + row * qkv_stride + (attention->num_heads + kv_head) * head_dim;
      const int64_t angle = attention->positions[row] * head_dim;
      for (int64_t q = 0; q < group; ++q) {
        rotate(cos + angle, signed_sin + angle, queries + q * head_dim, head_dim);
      }
      rotate(cos + angle, signed_sin + angle, key, head_dim);
      write_key_value(heads, key, key + num_kv_heads * head_dim);
      attend_group(heads, group, queries,
                   context + row * context_stride + kv_head * group * head_dim);
    }
  });
}

}  // namespace hav::HAV_ISA
