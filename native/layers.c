#include "layers.h"

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

int sx_layers_settle(struct sx_layers * layers, struct llama_context * ctx) {
    sx_trail_free(&layers->trail);
    int status = drop_local(layers, ctx);
    status = status ? status : check_shapes(layers, ctx);
    return status ? status : open_devices(layers);
}

void sx_layers_drop_unrotated(struct sx_layers * layers) {
    for (int l = layers->n - 1; l >= 0; --l) {
        if (layers->layer[l].rope.n_dims == 0) {
            drop(layers, l);
        }
    }
}
