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
            return sx_fail(SX_ERR_MODEL, "the K cache of layer %d has the shape %lld x %lld x %lld, not one row for each "
                    "of %u tokens", layer->index, (long long) keys->ne[0], (long long) keys->ne[1],
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

// The key of the token in cell 0, as float; `bytes` is scratch of the row's size.
static void read_key(const struct ggml_tensor * keys, uint8_t * bytes, float * values) {
    ggml_backend_tensor_get(keys, bytes, 0, keys->nb[1]);
    if (keys->type == GGML_TYPE_F32) {
        memcpy(values, bytes, keys->nb[1]);
    } else {
        ggml_get_type_traits(keys->type)->to_float(bytes, values, keys->ne[0]);
    }
}

static void read_all_keys(const struct sx_layers * layers, uint8_t * bytes, float * values) {
    for (int l = 0; l < layers->n; ++l) {
        read_key(layers->layer[l].keys, bytes, values);
        values += layers->layer[l].keys->ne[0];
    }
}

static double squared_distance(const float * a, const float * b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += (double) (a[i] - b[i]) * (a[i] - b[i]);
    }
    return sum;
}

// Compare, layer by layer, the keys `got` by rotation with those `wanted`, in relation to how far they are from `before`.
static int compare(const struct sx_layers * layers, const float * before, const float * got, const float * wanted) {
    for (int l = 0; l < layers->n; ++l) {
        const struct sx_layer * layer = &layers->layer[l];
        const int64_t n = layer->keys->ne[0];
        // Rounding reaches 1 % with bf16 and 20 % with q4_0; a rotation that is not the model's misses by about 100 %.
        const double tolerance = ggml_is_quantized(layer->keys->type) ? 0.5 : 0.05;
        const double missed = sqrt(squared_distance(got, wanted, n)), moved = sqrt(squared_distance(before, wanted, n));
        if (layer->rope.n_dims > 0 ? missed > tolerance * moved : moved > 0.0) {
            return sx_fail(SX_ERR_MODEL, "layer %d does not hold its keys as its compute graph says: moving one misses by "
                    "%.0f %%", layer->index, moved > 0.0 ? 100.0 * missed / moved : 100.0);
        }
        before += n, got += n, wanted += n;
    }
    return SX_OK;
}

// A single token attends to itself alone, so its keys at two positions differ by their rotation and nothing else, in
// every layer: move the key cached at position 0, and compare with what llama.cpp computes at the other position.
static int verify(struct sx_layers * layers, struct llama_context * ctx) {
    const int32_t n_train = llama_model_n_ctx_train(llama_get_model(ctx)), n_ctx = (int32_t) llama_n_ctx(ctx);
    const int32_t position = n_train < n_ctx ? n_train - 1 : n_ctx - 1;
    int64_t n = 0;
    size_t row_size = 1;
    for (int l = 0; l < layers->n; ++l) {
        n += layers->layer[l].keys->ne[0];
        row_size = layers->layer[l].keys->nb[1] > row_size ? layers->layer[l].keys->nb[1] : row_size;
    }
    float * values = malloc((3 * n + 1) * sizeof(float));
    uint8_t * bytes = malloc(row_size);
    int status = values && bytes ? SX_OK : sx_fail(SX_ERR_MEMORY, "out of memory");
    if (status == SX_OK) {
        read_all_keys(layers, bytes, values);
    }
    for (int d = 0; d < layers->n_devices && status == SX_OK; ++d) {
        status = sx_device_rotate(&layers->device[d], d, layers->layer, layers->n, &position, 1, llama_n_threads(ctx));
    }
    if (status == SX_OK) {
        read_all_keys(layers, bytes, values + n);
        llama_memory_clear(llama_get_memory(ctx), true);
        status = sx_layers_decode_probe(ctx, position);
    }
    if (status == SX_OK) {
        read_all_keys(layers, bytes, values + 2 * n);
        status = compare(layers, values, values + n, values + 2 * n);
    }
    free(bytes);
    free(values);
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
