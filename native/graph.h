// Reading a llama.cpp compute graph: where a layer's keys are written and how they were rotated.
#ifndef SX_GRAPH_H
#define SX_GRAPH_H

#include <stdbool.h>
#include <stdint.h>

#include "ggml.h"

// How a layer rotates its keys, as its graph says; angles in radians per position.
struct sx_rope {
    int64_t head_dim;    // elements of a head of the cached key, rotated ones and others
    int32_t n_dims;      // rotated elements of a head
    int32_t n_offset;    // first rotated element of a head
    int32_t mode;        // GGML_ROPE_TYPE_NORMAL or GGML_ROPE_TYPE_NEOX
    int32_t n_ctx_orig;  // YaRN's original context
    float   freq_base;
    float   freq_scale;
    float   ext_factor;  // YaRN mix, 0 = none
    float   beta_fast;
    float   beta_slow;
    int64_t n_hadamard;  // size of the Hadamard blocks that quantised keys are multiplied with after RoPE, 0 = none
    const struct ggml_tensor * freq_factors;  // (n_dims / 2) float, or NULL
};

// The K tensor (row = cell) that `node` writes keys to, and its layer number; NULL for any other node.
struct ggml_tensor * sx_graph_key_cache(const struct ggml_tensor * node, int * layer);

// Whether `node` writes values to the cache of a layer.
bool sx_graph_writes_values(const struct ggml_tensor * node, int * layer);

// Name of the cache that `node` reads or writes if it is neither one of keys nor one of values, else NULL: the index of
// sparse attention, a recurrent state.
const char * sx_graph_other_cache(const struct ggml_tensor * node);

// The nodes of a graph, noted while it runs. A graph that runs on several devices is cut where it changes device, and
// what flows on is a copy without a source: its name leads back to the node that was copied.
struct sx_trail {
    const struct ggml_tensor ** nodes;  // (n), in the order of execution
    int n, capacity;
};

// Note a node; false: out of memory.
bool sx_trail_note(struct sx_trail * trail, const struct ggml_tensor * node);
void sx_trail_free(struct sx_trail * trail);

enum sx_key_path {
    SX_KEY_ROPE,     // rotated, and all that happens between RoPE and cache is known: *rope is set
    SX_KEY_NO_ROPE,  // never rotated
    SX_KEY_UNKNOWN,  // rotated, but something this library does not know happens afterwards: *op says what
};

// Follow the keys that `node` (see sx_graph_key_cache) writes back to their RoPE. `trail` holds the nodes before it.
enum sx_key_path sx_graph_key_rope(
        const struct sx_trail * trail, const struct ggml_tensor * node, struct sx_rope * rope, const char ** op);

#endif
