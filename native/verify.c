// Move one key, and ask llama.cpp for the key it computes there.
#include "verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "selfextend.h"

int sx_decode_probe(struct llama_context * ctx, llama_pos position) {
    llama_token token = llama_vocab_bos(llama_model_get_vocab(llama_get_model(ctx)));
    token = token < 0 ? 0 : token;
    struct llama_batch batch = llama_batch_get_one(&token, 1);
    batch.pos = &position;
    const int32_t rc = llama_decode(ctx, batch);
    llama_synchronize(ctx);
    return rc == 0 ? SX_OK : sx_fail(SX_ERR_DECODE, "the warm-up decode failed (llama_decode returned %d)", rc);
}

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
int sx_layers_verify(struct sx_layers * layers, struct llama_context * ctx) {
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
        status = sx_decode_probe(ctx, position);
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
