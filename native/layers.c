#include "layers.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "selfextend.h"

void sx_layers_free(struct sx_layers * layers) {
    for (int i = 0; i < layers->n_devices; ++i) {
        sx_device_free(&layers->device[i]);
    }
    for (int i = 0; i < layers->n; ++i) {
        free(layers->layer[i].freq_factors);
    }
    free(layers->layer);
    sx_trail_free(&layers->trail);
}

// ---- finding ---------------------------------------------------------------------------------------------------

int sx_layers_decode_probe(struct llama_context * ctx, llama_pos position) {
    llama_token token = llama_vocab_bos(llama_model_get_vocab(llama_get_model(ctx)));
    token = token < 0 ? 0 : token;
    struct llama_batch batch = llama_batch_get_one(&token, 1);
    batch.pos = &position;
    const int32_t rc = llama_decode(ctx, batch);
    llama_synchronize(ctx);
    return rc == 0 ? SX_OK : sx_fail(SX_ERR_DECODE, "the warm-up decode failed (llama_decode returned %d)", rc);
}

int sx_layers_look_at(struct sx_layers * layers, const struct ggml_tensor * node) {
    if (!sx_trail_note(&layers->trail, node)) {
        return sx_fail(SX_ERR_MEMORY, "out of memory");
    }
    const char * other = sx_graph_other_cache(node);
    if (other) {
        return sx_fail(SX_ERR_MODEL, "the model keeps more than keys and values of the text (%s)", other);
    }
    int index = 0;
    struct ggml_tensor * keys = sx_graph_key_cache(node, &index);
    if (!keys) {
        return SX_OK;
    }
    struct sx_layer layer = { .index = index, .keys = keys };
    const char * op = "";
    if (sx_graph_key_rope(&layers->trail, node, &layer.rope, &op) == SX_KEY_UNKNOWN) {
        return sx_fail(SX_ERR_MODEL, "layer %d passes its rotated keys through %s, which Self-Extend does not know how "
                "to undo", index, op);
    }
    const struct sx_rope * rope = &layer.rope;
    if (rope->n_dims > 0 && rope->mode != GGML_ROPE_TYPE_NORMAL && rope->mode != GGML_ROPE_TYPE_NEOX) {
        return sx_fail(SX_ERR_MODEL, "layer %d uses multi-dimensional RoPE (type %d)", index, rope->mode);
    }
    for (int l = 0; l < layers->n; ++l) {
        if (layers->layer[l].index == index) {
            return sx_fail(SX_ERR_MODEL, "layer %d keeps a second cache of keys (sparse attention)", index);
        }
    }
    struct sx_layer * grown = realloc(layers->layer, (layers->n + 1) * sizeof(layer));
    if (!grown) {
        return sx_fail(SX_ERR_MEMORY, "out of memory");
    }
    layers->layer = grown;
    if (rope->freq_factors) {
        const size_t size = rope->n_dims / 2 * sizeof(float);
        layer.freq_factors = malloc(size);
        if (!layer.freq_factors) {
            return sx_fail(SX_ERR_MEMORY, "out of memory");
        }
        ggml_backend_tensor_get(rope->freq_factors, layer.freq_factors, 0, size);
    }
    layer.rope.freq_factors = NULL;  // graph tensors do not outlive the graph
    layers->layer[layers->n++] = layer;
    return SX_OK;
}

// ---- choosing --------------------------------------------------------------------------------------------------

static void drop(struct sx_layers * layers, int l) {
    free(layers->layer[l].freq_factors);
    layers->n--;
    memmove(&layers->layer[l], &layers->layer[l + 1], (layers->n - l) * sizeof(*layers->layer));
}

static bool contains(const uint8_t * bytes, size_t n_bytes, const uint8_t * pattern, size_t n_pattern) {
    for (size_t i = 0; i + n_pattern <= n_bytes; ++i) {
        if (bytes[i] == pattern[0] && memcmp(bytes + i, pattern, n_pattern) == 0) {
            return true;
        }
    }
    return false;
}

// Layers with sliding or chunked attention see keys nearby only, at distances that need no help. llama.cpp keeps them
// in a cache of their own, and its partial state of a sequence is what that cache holds: a layer is local if the key
// of the one cached token is found there.
static int drop_local(struct sx_layers * layers, struct llama_context * ctx) {
    const llama_state_seq_flags local = LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;
    const size_t size = llama_state_seq_get_size_ext(ctx, 0, local);
    if (llama_model_n_swa(llama_get_model(ctx)) == 0 || size == llama_state_seq_get_size_ext(ctx, 0, 0)) {
        return SX_OK;
    }
    uint8_t * state = malloc(size), * row = NULL;
    int status = SX_OK;
    if (!state || llama_state_seq_get_data_ext(ctx, state, size, 0, local) != size) {
        status = sx_fail(SX_ERR_MEMORY, "llama.cpp does not tell its sliding layers apart");
    }
    for (int l = layers->n - 1; l >= 0 && status == SX_OK; --l) {
        const struct ggml_tensor * keys = layers->layer[l].keys;
        uint8_t * grown = realloc(row, keys->nb[1]);
        if (!grown) {
            status = sx_fail(SX_ERR_MEMORY, "out of memory");
            break;
        }
        row = grown;
        ggml_backend_tensor_get(keys, row, 0, keys->nb[1]);
        if (contains(state, size, row, keys->nb[1])) {
            drop(layers, l);
            layers->any_local = true;
        }
    }
    free(row);
    free(state);
    return status;
}

static int check_shapes(const struct sx_layers * layers, const struct llama_context * ctx) {
    for (int l = 0; l < layers->n; ++l) {
        const struct sx_layer * layer = &layers->layer[l];
        const struct ggml_tensor * keys = layer->keys;
        const struct sx_rope * rope = &layer->rope;
        const bool whole_heads  = rope->n_dims == 0 || keys->ne[0] % rope->head_dim == 0;
        const bool whole_blocks = rope->n_hadamard == 0 || keys->ne[0] % rope->n_hadamard == 0;
        if (keys->ne[1] != llama_n_ctx(ctx) || keys->ne[2] != 1 || !whole_heads || !whole_blocks) {
            return sx_fail(SX_ERR_MODEL, "the K cache of layer %d has the shape %lld x %lld x %lld, not one row for "
                    "each of %u tokens", layer->index, (long long) keys->ne[0], (long long) keys->ne[1],
                    (long long) keys->ne[2], llama_n_ctx(ctx));
        }
    }
    return SX_OK;
}

static int open_devices(struct sx_layers * layers) {
    for (int l = 0; l < layers->n; ++l) {
        struct sx_layer * layer = &layers->layer[l];
        layer->device = -1;
        if (layer->rope.n_dims == 0) {
            continue;
        }
        const ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(layer->keys->buffer);
        int d = 0;
        while (d < layers->n_devices && layers->device[d].buffer_type != type) {
            d++;
        }
        if (d == SX_MAX_DEVICES) {
            return sx_fail(SX_ERR_DEVICE, "the K cache is spread over more than %d devices", SX_MAX_DEVICES);
        }
        if (d == layers->n_devices) {
            layers->n_devices++;  // counted even if it fails, so that it is freed
            const int status = sx_device_init(&layers->device[d], layer);
            if (status != SX_OK) {
                return status;
            }
        }
        layer->device = d;
    }
    return SX_OK;
}

// ---- verifying -------------------------------------------------------------------------------------------------

// The cells that copies of one key are moved in: so many that all ways of rotating rows are taken.
enum { N_RUN = 128, N_CELLS = 192 };

// A long run of equal distances, then distances of 1 in between.
static int32_t distance_of_cell(int32_t cell, int32_t position) {
    return cell < N_RUN || cell % 2 == 0 ? position : 1;
}

static void to_float(const struct ggml_tensor * keys, const uint8_t * row, float * values) {
    if (keys->type == GGML_TYPE_F32) {
        memcpy(values, row, keys->nb[1]);
    } else {
        ggml_get_type_traits(keys->type)->to_float(row, values, keys->ne[0]);
    }
}

// The keys in cell 0 of all layers, one behind the other: as stored, and as float.
static void read_probe(const struct sx_layers * layers, uint8_t * rows, float * values) {
    for (int l = 0; l < layers->n; ++l) {
        const struct ggml_tensor * keys = layers->layer[l].keys;
        ggml_backend_tensor_get(keys, rows, 0, keys->nb[1]);
        to_float(keys, rows, values);
        rows   += keys->nb[1];
        values += keys->ne[0];
    }
}

// Fill the first n_cells cells of all layers with the keys that read_probe gave. `cells` is scratch.
static void copy_probe(struct sx_layers * layers, const uint8_t * rows, uint8_t * cells, int32_t n_cells) {
    for (int l = 0; l < layers->n; ++l) {
        struct ggml_tensor * keys = layers->layer[l].keys;
        const size_t size = keys->nb[1];
        for (int32_t cell = 0; cell < n_cells; ++cell) {
            memcpy(cells + cell * size, rows, size);
        }
        ggml_backend_tensor_set(keys, cells, 0, n_cells * size);
        rows += size;
    }
}

static double distance(const float * a, const float * b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += (double) (a[i] - b[i]) * (a[i] - b[i]);
    }
    return sqrt(sum);
}

// Compare, layer by layer, the keys moved by `position` with those `wanted` there, in relation to how far these are
// from the keys `before`. `cells` and `values` are scratch.
static int compare(
        const struct sx_layers * layers, const float * before, const float * wanted, int32_t position, int32_t n_cells,
        uint8_t * cells, float * values) {
    for (int l = 0; l < layers->n; ++l) {
        const struct sx_layer * layer = &layers->layer[l];
        const int64_t n = layer->keys->ne[0];
        const double moved = distance(before, wanted, n);
        // Rounding reaches 1 % with bf16 and 20 % with q4_0; a rotation that is not the model's misses by about 100 %.
        const double tolerance = (ggml_is_quantized(layer->keys->type) ? 0.5 : 0.05) * moved;
        double missed = 0.0;
        ggml_backend_tensor_get(layer->keys, cells, 0, n_cells * layer->keys->nb[1]);
        for (int32_t cell = 0; cell < n_cells; ++cell) {
            if (layer->rope.n_dims == 0 || distance_of_cell(cell, position) == position) {
                to_float(layer->keys, cells + cell * layer->keys->nb[1], values);
                const double d = distance(values, wanted, n);
                missed = d > missed ? d : missed;
            }
        }
        if (!(missed <= tolerance)) {
            return sx_fail(SX_ERR_MODEL, "layer %d does not hold its keys as its compute graph says: moving one misses "
                    "by %.0f %%", layer->index, moved > 0.0 ? 100.0 * missed / moved : 100.0);
        }
        before += n, wanted += n;
    }
    return SX_OK;
}

// A single token attends to itself alone, so its keys at two positions differ by their rotation and nothing else, in
// every layer: move copies of the key of position 0, and compare with the key that llama.cpp computes at the other one.
static int verify(struct sx_layers * layers, struct llama_context * ctx) {
    const int32_t n_train = llama_model_n_ctx_train(llama_get_model(ctx)), n_ctx = (int32_t) llama_n_ctx(ctx);
    const int32_t position = n_train < n_ctx ? n_train - 1 : n_ctx - 1, n_cells = n_ctx < N_CELLS ? n_ctx : N_CELLS;
    int64_t n = 1, longest = 1;
    size_t size = 1, largest = 1;
    for (int l = 0; l < layers->n; ++l) {
        const struct ggml_tensor * keys = layers->layer[l].keys;
        n += keys->ne[0], size += keys->nb[1];
        longest = keys->ne[0] > longest ? keys->ne[0] : longest;
        largest = keys->nb[1] > largest ? keys->nb[1] : largest;
    }
    float   * before = malloc(n * sizeof(float));
    float   * wanted = malloc(n * sizeof(float));
    float   * values = malloc(longest * sizeof(float));
    uint8_t * rows   = malloc(size);
    uint8_t * cells  = malloc(size > n_cells * largest ? size : n_cells * largest);
    int status = before && wanted && values && rows && cells ? SX_OK : sx_fail(SX_ERR_MEMORY, "out of memory");
    if (status == SX_OK) {
        read_probe(layers, rows, before);
        llama_memory_clear(llama_get_memory(ctx), true);
        status = sx_layers_decode_probe(ctx, position);
    }
    if (status == SX_OK) {
        int32_t delta[N_CELLS];
        for (int32_t cell = 0; cell < n_cells; ++cell) {
            delta[cell] = distance_of_cell(cell, position);
        }
        read_probe(layers, cells, wanted);
        copy_probe(layers, rows, cells, n_cells);
        for (int d = 0; d < layers->n_devices && status == SX_OK; ++d) {
            status = sx_device_rotate(&layers->device[d], d, layers->layer, layers->n, delta, n_cells,
                    llama_n_threads(ctx));
        }
    }
    if (status == SX_OK) {
        status = compare(layers, before, wanted, position, n_cells, cells, values);
    }
    free(cells);
    free(rows);
    free(values);
    free(wanted);
    free(before);
    return status;
}

int sx_layers_settle(struct sx_layers * layers, struct llama_context * ctx) {
    sx_trail_free(&layers->trail);
    int status = drop_local(layers, ctx);
    status = status ? status : check_shapes(layers, ctx);
    status = status ? status : open_devices(layers);
    status = status ? status : verify(layers, ctx);
    for (int l = layers->n - 1; l >= 0 && status == SX_OK; --l) {
        if (layers->layer[l].rope.n_dims == 0) {
            drop(layers, l);
        }
    }
    return status;
}
