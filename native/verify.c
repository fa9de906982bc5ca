/*
 * Two questions, asked of every layer.
 *
 * Is the rotation the model's? A single token attends to itself alone, so its keys at two positions differ by their
 * rotation and nothing else. Copies of the key of position 0 are rotated, and compared with the key that llama.cpp
 * computes at another position: both in f32, as they are before the cache rounds them. The key of a first token often lies
 * in pairs that hardly turn (in a layer of Gemma 3 it is 139 long and moves by 1), and few bits would hide its move.
 *
 * Does the cache rotate like that? Its cells are filled with noise, which lies in all pairs alike, rotated where they are,
 * and compared with the same numbers rotated in f32.
 */
#include "verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "selfextend.h"

// ---- probes ----------------------------------------------------------------------------------------------------

int sx_decode_probe(struct llama_context * ctx, llama_pos position) {
    llama_token token = llama_vocab_bos(llama_model_get_vocab(llama_get_model(ctx)));
    token = token < 0 ? 0 : token;
    struct llama_batch batch = llama_batch_get_one(&token, 1);
    batch.pos = &position;
    const int32_t rc = llama_decode(ctx, batch);
    llama_synchronize(ctx);
    return rc == 0 ? SX_OK : sx_fail(SX_ERR_DECODE, "the warm-up decode failed (llama_decode returned %d)", rc);
}

static void to_float(enum ggml_type type, const void * row, float * values, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(values, row, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(row, values, n);
    }
}

int sx_probe_note(struct sx_probe * probe, const struct ggml_tensor * node) {
    struct sx_written written = { 0 };
    written.is_key = sx_graph_key_cache(node, &written.layer) != NULL;
    if (!written.is_key && !sx_graph_writes_values(node, &written.layer)) {
        return SX_OK;
    }
    const struct ggml_tensor * source = node->src[0];
    if (!ggml_is_contiguous(source)) {
        return sx_fail(SX_ERR_MODEL, "layer %d writes its keys in an order that this library does not know", written.layer);
    }
    written.n   = ggml_nelements(source);
    written.row = malloc(written.n * sizeof(float));
    void * raw  = malloc(ggml_nbytes(source));
    struct sx_written * grown = realloc(probe->written, (probe->n + 1) * sizeof(written));
    probe->written = grown ? grown : probe->written;
    if (!written.row || !raw || !grown) {
        free(raw);
        free(written.row);
        return sx_fail(SX_ERR_MEMORY, "out of memory");
    }
    ggml_backend_tensor_get(source, raw, 0, ggml_nbytes(source));
    to_float(source->type, raw, written.row, written.n);
    free(raw);
    probe->written[probe->n++] = written;
    return SX_OK;
}

void sx_probe_free(struct sx_probe * probe) {
    for (int i = 0; i < probe->n; ++i) {
        free(probe->written[i].row);
    }
    free(probe->written);
    *probe = (struct sx_probe) { 0 };
}

// What `layer` wrote, NULL if nothing of n elements (0 = any number).
static const struct sx_written * find(const struct sx_probe * probe, int layer, bool is_key, int64_t n) {
    for (int i = 0; i < probe->n; ++i) {
        const struct sx_written * w = &probe->written[i];
        if (w->layer == layer && w->is_key == is_key && (n == 0 || w->n == n)) {
            return w;
        }
    }
    return NULL;
}

// ---- comparing -------------------------------------------------------------------------------------------------

static double distance(const float * a, const float * b, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += (double) (a[i] - b[i]) * (a[i] - b[i]);
    }
    return sqrt(sum);
}

static double length(const float * a, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        sum += (double) a[i] * a[i];
    }
    return sqrt(sum);
}

static int fail_layer(const struct sx_layer * layer, double missed, double moved) {
    return sx_fail(SX_ERR_MODEL, "layer %d does not hold its keys as its compute graph says: moving one misses by %.0f %%",
            layer->index, moved > 0.0 ? 100.0 * missed / moved : 100.0);
}

/*
 * Compare, head by head, a key that was moved with the one `wanted`, and that with the key `before`. Both are computed in
 * f32, by the same operators from the same numbers. What they may differ by:
 *   1 % of the move   angles in f32, computed by two devices
 *   1e-5 of the key   products and sums in f32
 *   `noise`           part of the key that is known to differ for other reasons
 */
static int compare(
        const struct sx_layer * layer, const float * before, const float * wanted, const float * got, double noise) {
    const int64_t n = layer->keys->ne[0], n_head = layer->rope.n_dims > 0 ? layer->rope.head_dim : n;
    for (int64_t i = 0; i < n; i += n_head) {
        const double moved = distance(before + i, wanted + i, n_head), missed = distance(got + i, wanted + i, n_head);
        if (!(missed <= 0.01 * moved + (1e-5 + noise) * length(wanted + i, n_head))) {
            return fail_layer(layer, missed, moved);
        }
    }
    return SX_OK;
}

// ---- rotating --------------------------------------------------------------------------------------------------

// The cells that are rotated: so many that all ways of rotating rows are taken. A long run of equal distances, then every
// other cell stays.
enum { N_RUN = 128, N_CELLS = 192 };

static int32_t distance_of_cell(int32_t cell) {
    return cell < N_RUN || cell % 2 == 0 ? SX_PROBE_POSITION : 0;
}

// A layer, the same layer with cells of f32 in place of its cache, and memory for their rows.
struct test {
    const struct sx_layer * layer;
    struct sx_layer         exact;
    struct sx_device      * device;
    int                     n_threads;
    int64_t                 n;  // elements of a row
    struct ggml_context   * ctx;
    ggml_backend_buffer_t   buffer;
    float                 * start, * moved, * other;  // (N_CELLS, n)
    uint8_t               * rows;                     // N_CELLS rows of the cache
};

static void test_free(struct test * t) {
    free(t->rows);
    free(t->other);
    free(t->moved);
    free(t->start);
    ggml_backend_buffer_free(t->buffer);
    ggml_free(t->ctx);
}

static int test_init(struct test * t, const struct sx_layer * layer, struct sx_device * device, int n_threads) {
    const int64_t n = layer->keys->ne[0];
    if (layer->keys->ne[1] < N_CELLS) {
        return sx_fail(SX_ERR_MODEL, "the context is too small to be tried: %lld tokens, not %d",
                (long long) layer->keys->ne[1], N_CELLS);
    }
    *t = (struct test) { .layer = layer, .exact = *layer, .device = device, .n_threads = n_threads, .n = n };
    t->ctx = ggml_init((struct ggml_init_params) { .mem_size = ggml_tensor_overhead(), .no_alloc = true });
    if (t->ctx) {
        t->exact.keys = ggml_new_tensor_2d(t->ctx, GGML_TYPE_F32, n, N_CELLS);
        t->buffer = ggml_backend_alloc_ctx_tensors_from_buft(t->ctx, device->buffer_type);
    }
    t->start = malloc(N_CELLS * n * sizeof(float));
    t->moved = malloc(N_CELLS * n * sizeof(float));
    t->other = malloc(N_CELLS * n * sizeof(float));
    t->rows  = malloc(N_CELLS * layer->keys->nb[1]);
    const bool complete = t->buffer && t->start && t->moved && t->other && t->rows;
    return complete ? SX_OK : sx_fail(SX_ERR_MEMORY, "out of memory for moving keys of layer %d", layer->index);
}

static int rotate(struct test * t, const struct sx_layer * layer) {
    int32_t delta[N_CELLS];
    for (int32_t cell = 0; cell < N_CELLS; ++cell) {
        delta[cell] = distance_of_cell(cell);
    }
    return sx_device_rotate(t->device, layer->device, layer, 1, delta, N_CELLS, t->n_threads);
}

// Rotate `start` in f32 into `moved`.
static int rotate_exactly(struct test * t) {
    ggml_backend_tensor_set(t->exact.keys, t->start, 0, ggml_nbytes(t->exact.keys));
    const int status = rotate(t, &t->exact);
    ggml_backend_tensor_get(t->exact.keys, t->moved, 0, ggml_nbytes(t->exact.keys));
    return status;
}

// Is the rotation the model's? `noise` as in compare.
static int verify_rotation(struct test * t, const float * here, const float * there, double noise) {
    for (int32_t cell = 0; cell < N_CELLS; ++cell) {
        memcpy(t->start + cell * t->n, here, t->n * sizeof(float));
    }
    int status = rotate_exactly(t);
    // A rotation by nothing shows what the device loses: some compute products with a Hadamard matrix in fewer bits.
    double lost = 0.0;
    for (int32_t cell = 0; cell < N_CELLS; ++cell) {
        if (distance_of_cell(cell) == 0) {
            const double d = distance(t->moved + cell * t->n, here, t->n);
            lost = d > lost ? d : lost;
        }
    }
    const double whole = length(here, t->n);
    noise += whole > 0.0 ? 2.0 * lost / whole : 0.0;
    for (int32_t cell = 0; cell < N_CELLS && status == SX_OK; ++cell) {
        if (distance_of_cell(cell) != 0) {
            status = compare(t->layer, here, there, t->moved + cell * t->n, noise);
        }
    }
    return status;
}

// Round the rows of `values` to the type of the cache, into `rows` and back into `rounded`.
static void round_rows(struct test * t, const float * values, float * rounded) {
    const struct ggml_tensor * keys = t->layer->keys;
    ggml_quantize_chunk(keys->type, values, t->rows, 0, N_CELLS, t->n, NULL);
    to_float(keys->type, t->rows, rounded, N_CELLS * t->n);
}

/*
 * Does the cache rotate like that? A cell may differ from the same numbers rotated in f32 by one rounding to the type of
 * the cache. How much that is, is measured: a rounding on another device may fall to the other side, hence the 2.
 */
static int verify_cache(struct test * t) {
    struct ggml_tensor * keys = t->layer->keys;
    const int64_t n = t->n, n_head = t->layer->rope.head_dim;
    uint32_t random = 1;
    for (int64_t i = 0; i < N_CELLS * n; ++i) {
        random = random * 1664525u + 1013904223u;
        t->other[i] = (float) random / 4294967296.0f - 0.5f;
    }
    round_rows(t, t->other, t->start);
    ggml_backend_tensor_set(keys, t->rows, 0, N_CELLS * keys->nb[1]);
    int status = rotate_exactly(t);
    status = status ? status : rotate(t, t->layer);
    round_rows(t, t->moved, t->other);
    for (int64_t i = 0; i < N_CELLS * n; i += n_head) {  // roundings, in place of the rounded
        t->other[i] = (float) distance(t->moved + i, t->other + i, n_head);
    }
    ggml_backend_tensor_get(keys, t->rows, 0, N_CELLS * keys->nb[1]);
    float * got = t->start;
    to_float(keys->type, t->rows, got, N_CELLS * n);
    for (int64_t i = 0; i < N_CELLS * n && status == SX_OK; i += n_head) {
        const double missed = distance(got + i, t->moved + i, n_head), whole = length(t->moved + i, n_head);
        if (!(missed <= 2.0 * t->other[i] + 0.01 * whole)) {
            status = sx_fail(SX_ERR_DEVICE, "%s does not rotate %s keys as it rotates f32: in layer %d they miss by %.0f %%",
                    ggml_backend_name(t->device->backend), ggml_type_name(keys->type), t->layer->index,
                    100.0 * missed / whole);
        }
    }
    return status;
}

/*
 * Part of a layer's key that may differ between the two decodes without any rotation. It comes from the layer's input,
 * which is the same bit for bit unless the model has attention sinks: these weigh a token by its own rounded key. The
 * layer's value, which nothing rotates, comes from the same input and tells how much that is. A wrong rotation of keys that
 * lie in all pairs alike misses by more than their length.
 */
static double input_noise(const struct sx_probe * here, const struct sx_probe * there, int layer) {
    const struct sx_written * a = find(here, layer, false, 0), * b = a ? find(there, layer, false, a->n) : NULL;
    const double whole = b ? length(b->row, b->n) : 0.0, noise = whole > 0.0 ? distance(a->row, b->row, b->n) / whole : 0.0;
    return noise < 0.125 ? 4.0 * noise : 0.5;
}

static int verify_layer(
        struct sx_layers * layers, const struct sx_layer * layer, const struct sx_probe * here,
        const struct sx_probe * there, int n_threads) {
    const int64_t n = layer->keys->ne[0];
    const struct sx_written * a = find(here, layer->index, true, n), * b = find(there, layer->index, true, n);
    if (!a || !b) {
        return sx_fail(SX_ERR_MODEL, "layer %d does not write its key whenever a token is decoded", layer->index);
    }
    const double noise = input_noise(here, there, layer->index);
    if (layer->rope.n_dims == 0) {
        return compare(layer, a->row, b->row, a->row, noise);
    }
    struct test t = { 0 };
    int status = test_init(&t, layer, &layers->device[layer->device], n_threads);
    status = status ? status : verify_rotation(&t, a->row, b->row, noise);
    status = status ? status : verify_cache(&t);
    test_free(&t);
    return status;
}

int sx_layers_verify(
        struct sx_layers * layers, const struct sx_probe * here, const struct sx_probe * there, int n_threads) {
    int status = SX_OK;
    for (int l = 0; l < layers->n && status == SX_OK; ++l) {
        status = verify_layer(layers, &layers->layer[l], here, there, n_threads);
    }
    return status;
}
