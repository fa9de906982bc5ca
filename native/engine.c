// The engine: which position every cached key stands for, and the calls into llama.cpp that keep it true.
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "rotate.h"
#include "selfextend.h"

enum { MAX_DEVICES = 16, MAX_POSITION_INPUTS = 64 };

struct sx_engine {
    struct llama_context * ctx;  // NULL until attached
    int32_t   n_ctx;
    int32_t   n_tokens;          // cached tokens
    int32_t * positions;         // (n_ctx) key position of each cached token
    int32_t * delta;             // (n_ctx) scratch: rotation of each row, in positions
    int32_t * read_buffer;       // (2 * n_ctx) scratch for index tensors read from a device

    struct sx_layer * layers;    // (n_layers) only layers with RoPE
    int       n_layers;
    int32_t * next_cell;         // (n_layers) during a decode: the cell that the layer writes next
    struct sx_device devices[MAX_DEVICES];
    int       n_devices;

    bool      finding;           // the warm-up decode is running: collect layers
    bool      decoding;          // a decode is running: verify, and move positions into the frame
    int       fault;             // sx_status found by the callback, with its message already stored
    // Position inputs of the running micro-batch that already hold frame positions (a scheduler copies
    // the input once per device), and the first token index of that micro-batch.
    const struct ggml_tensor * framed[MAX_POSITION_INPUTS];
    int       n_framed;
    int32_t   framed_at;
    const struct ggml_tensor * checked_cells;  // index tensor that was already verified
    int32_t   checked_at;

    struct sx_stats stats;
};

static void * allocate(size_t n, size_t size) {
    return calloc(n ? n : 1, size);
}

sx_engine * sx_engine_init(int32_t n_ctx) {
    if (n_ctx < 1) {
        sx_fail(SX_ERR_ARGUMENT, "n_ctx must be positive, not %d", n_ctx);
        return NULL;
    }
    sx_engine * e = allocate(1, sizeof(*e));
    if (e) {
        e->n_ctx       = n_ctx;
        e->positions   = allocate(n_ctx, sizeof(int32_t));
        e->delta       = allocate(n_ctx, sizeof(int32_t));
        e->read_buffer = allocate(2 * (size_t) n_ctx, sizeof(int32_t));
    }
    if (!e || !e->positions || !e->delta || !e->read_buffer) {
        sx_engine_free(e);
        sx_fail(SX_ERR_MEMORY, "out of memory for an engine of %d tokens", n_ctx);
        return NULL;
    }
    return e;
}

void sx_engine_free(sx_engine * e) {
    if (!e) {
        return;
    }
    for (int i = 0; i < e->n_devices; ++i) {
        sx_device_free(&e->devices[i]);
    }
    for (int i = 0; i < e->n_layers; ++i) {
        free(e->layers[i].freq_factors);
    }
    free(e->layers);
    free(e->next_cell);
    free(e->positions);
    free(e->delta);
    free(e->read_buffer);
    free(e);
}

// The frame: what is subtracted from every position before it becomes an angle.
static int32_t frame_of(const int32_t * positions, int32_t n) {
    return n > 0 ? positions[0] : 0;
}

// ---- graph callback --------------------------------------------------------------------------------------------

static void fail_in_callback(sx_engine * e, int status) {
    e->fault = e->fault ? e->fault : status;
}

// Warm-up: remember the K tensor and the RoPE of the layer that `node` writes.
static void collect_layer(sx_engine * e, const struct ggml_tensor * node, struct ggml_tensor * keys, int index) {
    struct sx_layer layer = { .index = index, .keys = keys };
    const char * op = "";
    if (keys->type != GGML_TYPE_F32 && keys->type != GGML_TYPE_F16 && keys->type != GGML_TYPE_BF16) {
        fail_in_callback(e, sx_fail(SX_ERR_MODEL, "a K cache of type %s cannot be rewritten; use f16, bf16 or f32",
                ggml_type_name(keys->type)));
        return;
    }
    switch (sx_graph_key_rope(node, &layer.rope, &op)) {
        case SX_KEY_NO_ROPE:
            return;
        case SX_KEY_UNKNOWN:
            fail_in_callback(e, sx_fail(SX_ERR_MODEL, "layer %d passes its rotated keys through %s, which Self-Extend "
                    "does not know how to undo", index, op));
            return;
        case SX_KEY_ROPE:
            break;
    }
    const struct sx_rope * rope = &layer.rope;
    if (rope->mode != GGML_ROPE_TYPE_NORMAL && rope->mode != GGML_ROPE_TYPE_NEOX) {
        fail_in_callback(e, sx_fail(SX_ERR_MODEL, "layer %d uses multi-dimensional RoPE (type %d)", index, rope->mode));
        return;
    }
    if (keys->ne[1] != e->n_ctx || keys->ne[2] != 1 || keys->ne[0] % rope->head_dim != 0) {
        fail_in_callback(e, sx_fail(SX_ERR_MODEL, "the K cache of layer %d has the shape %lld x %lld x %lld, not one row for "
                "each of %d tokens", index, (long long) keys->ne[0], (long long) keys->ne[1],
                (long long) keys->ne[2], e->n_ctx));
        return;
    }
    struct sx_layer * layers = realloc(e->layers, (e->n_layers + 1) * sizeof(*layers));
    if (!layers) {
        fail_in_callback(e, sx_fail(SX_ERR_MEMORY, "out of memory"));
        return;
    }
    e->layers = layers;
    if (rope->freq_factors) {
        const size_t size = rope->n_dims / 2 * sizeof(float);
        layer.freq_factors = malloc(size);
        if (!layer.freq_factors) {
            fail_in_callback(e, sx_fail(SX_ERR_MEMORY, "out of memory"));
            return;
        }
        ggml_backend_tensor_get(rope->freq_factors, layer.freq_factors, 0, size);
    }
    layer.rope.freq_factors = NULL;  // graph tensors do not outlive the graph
    layer.rope.positions    = NULL;
    e->layers[e->n_layers++] = layer;
}

// The keys of tokens next, next + 1, ... must go to the cells of the same numbers.
static void check_cells(sx_engine * e, const struct ggml_tensor * node, const struct ggml_tensor * keys) {
    int l = 0;
    while (l < e->n_layers && e->layers[l].keys != keys) {
        l++;
    }
    if (l == e->n_layers) {
        return;  // a layer without RoPE
    }
    const struct ggml_tensor * cells = node->src[1];
    const int64_t n = cells->ne[0];
    const int32_t at = e->next_cell[l];
    if (n > e->n_ctx - at) {
        fail_in_callback(e, sx_fail(SX_ERR_CACHE, "layer %d writes more keys than the cache holds", e->layers[l].index));
        return;
    }
    if (cells != e->checked_cells || at != e->checked_at) {
        ggml_backend_tensor_get(cells, e->read_buffer, 0, ggml_nbytes(cells));
        for (int64_t i = 0; i < n; ++i) {
            const int64_t cell = cells->type == GGML_TYPE_I64 ? ((const int64_t *) e->read_buffer)[i] : e->read_buffer[i];
            if (cell != at + i) {
                fail_in_callback(e, sx_fail(SX_ERR_CACHE, "the key of token %lld went to cell %lld",
                        (long long) (at + i), (long long) cell));
                return;
            }
        }
        e->checked_cells = cells;
        e->checked_at    = at;
    }
    e->next_cell[l] = at + (int32_t) n;
}

// Token indices of the running micro-batch start where the layer that is furthest behind writes next.
static int32_t micro_batch_begin(const sx_engine * e) {
    int32_t begin = e->next_cell[0];
    for (int l = 1; l < e->n_layers; ++l) {
        begin = e->next_cell[l] < begin ? e->next_cell[l] : begin;
    }
    return begin;
}

// Subtract the frame from the positions that a RoPE node is about to read.
static void move_into_frame(sx_engine * e, struct ggml_tensor * positions) {
    const int32_t frame = frame_of(e->positions, e->n_tokens);
    if (frame == 0) {
        return;
    }
    const int32_t begin = micro_batch_begin(e);
    if (e->framed_at != begin) {
        e->framed_at = begin;
        e->n_framed  = 0;
    }
    for (int i = 0; i < e->n_framed; ++i) {
        if (e->framed[i] == positions) {
            return;
        }
    }
    const int64_t n = positions->ne[0];
    if (n > e->n_ctx || e->n_framed == MAX_POSITION_INPUTS || positions->type != GGML_TYPE_I32) {
        fail_in_callback(e, sx_fail(SX_ERR_CACHE, "unexpected position input %s", positions->name));
        return;
    }
    int32_t * values = e->read_buffer;
    ggml_backend_tensor_get(positions, values, 0, n * sizeof(int32_t));
    // Raw token indices, or a copy made from an input that is in the frame already; nothing else.
    const int32_t offset = values[0] == begin ? 0 : frame;
    for (int64_t i = 0; i < n; ++i) {
        if (values[i] != begin + i - offset) {
            fail_in_callback(e, sx_fail(SX_ERR_CACHE, "token %lld reached RoPE with position %d",
                    (long long) (begin + i), values[i]));
            return;
        }
        values[i] = begin + (int32_t) i - frame;
    }
    ggml_backend_tensor_set(positions, values, 0, n * sizeof(int32_t));
    e->framed[e->n_framed++] = positions;
}

// Whatever reads token indices other than RoPE (learned position embeddings) would see frame positions.
static bool reads_positions_outside_rope(const struct ggml_tensor * node) {
    if (node->op == GGML_OP_ROPE) {
        return false;
    }
    for (int i = 0; i < GGML_MAX_SRC && node->src[i]; ++i) {
        if (strncmp(node->src[i]->name, "inp_pos", 7) == 0) {
            return true;
        }
    }
    return false;
}

bool sx_engine_eval_callback(struct ggml_tensor * node, bool ask, void * user_data) {
    sx_engine * e = user_data;
    if (!ask || !(e->finding || e->decoding) || e->fault) {
        return false;
    }
    if (e->finding && reads_positions_outside_rope(node)) {
        fail_in_callback(e, sx_fail(SX_ERR_MODEL, "positions are used outside RoPE (by %s)", ggml_op_desc(node)));
    }
    if (node->op == GGML_OP_ROPE && e->decoding) {
        move_into_frame(e, node->src[1]);
        return false;
    }
    int layer = 0;
    struct ggml_tensor * keys = sx_graph_key_cache(node, &layer);
    if (keys && e->finding) {
        collect_layer(e, node, keys, layer);
    } else if (keys) {
        check_cells(e, node, keys);
    }
    return false;
}

// ---- attach ----------------------------------------------------------------------------------------------------

static int check_model(const sx_engine * e, struct llama_context * ctx) {
    const struct llama_model * model = llama_get_model(ctx);
    if (llama_model_is_recurrent(model) || llama_model_is_hybrid(model)) {
        return sx_fail(SX_ERR_MODEL, "the model is recurrent: its memory of the text is a state, not a cache of keys");
    }
    if (llama_model_has_encoder(model) || llama_model_is_diffusion(model)) {
        return sx_fail(SX_ERR_MODEL, "the model is not a plain decoder");
    }
    const enum llama_rope_type rope = llama_model_rope_type(model);
    if (rope == LLAMA_ROPE_TYPE_NONE) {
        return sx_fail(SX_ERR_MODEL, "the model has no rotary position embeddings (RoPE)");
    }
    if (rope != LLAMA_ROPE_TYPE_NORM && rope != LLAMA_ROPE_TYPE_NEOX) {
        return sx_fail(SX_ERR_MODEL, "the model uses multi-dimensional RoPE (M-RoPE)");
    }
    if (llama_model_n_swa(model) > 0) {
        return sx_fail(SX_ERR_MODEL, "the model uses sliding-window attention (%d tokens), which is not supported yet",
                llama_model_n_swa(model));
    }
    if (llama_n_seq_max(ctx) != 1) {
        return sx_fail(SX_ERR_MODEL, "the context is made for %u sequences; Self-Extend handles one", llama_n_seq_max(ctx));
    }
    if (llama_n_ctx(ctx) != (uint32_t) e->n_ctx) {
        return sx_fail(SX_ERR_ARGUMENT, "the engine is made for %d tokens, the context for %u", e->n_ctx, llama_n_ctx(ctx));
    }
    return SX_OK;
}

static int warm_up(sx_engine * e, struct llama_context * ctx) {
    llama_token token = llama_vocab_bos(llama_model_get_vocab(llama_get_model(ctx)));
    token = token < 0 ? 0 : token;
    e->finding = true;
    const int32_t rc = llama_decode(ctx, llama_batch_get_one(&token, 1));
    llama_synchronize(ctx);
    e->finding = false;
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_perf_context_reset(ctx);
    if (rc != 0) {
        return sx_fail(SX_ERR_DECODE, "the warm-up decode failed (llama_decode returned %d)", rc);
    }
    return e->fault;
}

static int open_devices(sx_engine * e) {
    for (int l = 0; l < e->n_layers; ++l) {
        struct sx_layer * layer = &e->layers[l];
        const ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(layer->keys->buffer);
        int d = 0;
        while (d < e->n_devices && e->devices[d].buffer_type != type) {
            d++;
        }
        if (d == MAX_DEVICES) {
            return sx_fail(SX_ERR_DEVICE, "the K cache is spread over more than %d devices", MAX_DEVICES);
        }
        if (d == e->n_devices) {
            e->n_devices++;  // counted even if it fails, so that it is freed
            const int status = sx_device_init(&e->devices[d], layer);
            if (status != SX_OK) {
                return status;
            }
        }
        layer->device = d;
    }
    return SX_OK;
}

int32_t sx_engine_attach(sx_engine * e, struct llama_context * ctx) {
    if (e->ctx || e->n_layers > 0) {
        return sx_fail(SX_ERR_ARGUMENT, "the engine has been attached before");
    }
    int status = check_model(e, ctx);
    if (status == SX_OK) {
        status = warm_up(e, ctx);
    }
    if (status == SX_OK && e->n_layers == 0) {
        status = sx_fail(SX_ERR_MODEL, "no layer writes rotated keys to a cache that this library recognises");
    }
    if (status == SX_OK) {
        status = open_devices(e);
    }
    if (status == SX_OK) {
        e->next_cell = allocate(e->n_layers, sizeof(int32_t));
        status = e->next_cell ? SX_OK : sx_fail(SX_ERR_MEMORY, "out of memory");
    }
    e->fault = 0;
    e->ctx   = status == SX_OK ? ctx : NULL;
    return status;
}

// ---- positions -------------------------------------------------------------------------------------------------

int32_t sx_engine_n_layers(const sx_engine * e) {
    return e->n_layers;
}

int32_t sx_engine_n_tokens(const sx_engine * e) {
    return e->n_tokens;
}

void sx_engine_get_key_positions(const sx_engine * e, int32_t * positions) {
    memcpy(positions, e->positions, e->n_tokens * sizeof(int32_t));
}

struct sx_stats sx_engine_stats(const sx_engine * e) {
    return e->stats;
}

static int check_positions(const sx_engine * e, const int32_t * positions, int32_t n) {
    for (int32_t k = 0; k < n; ++k) {
        if (positions[k] < 0 || positions[k] > e->n_ctx) {
            return sx_fail(SX_ERR_ARGUMENT, "key position %d of token %d lies outside 0..%d", positions[k], k, e->n_ctx);
        }
    }
    return SX_OK;
}

int32_t sx_engine_set_key_positions(sx_engine * e, const int32_t * positions, int32_t n) {
    if (!e->ctx || n != e->n_tokens) {
        return sx_fail(SX_ERR_ARGUMENT, "%d key positions for %d cached tokens", n, e->n_tokens);
    }
    int status = check_positions(e, positions, n);
    if (status != SX_OK) {
        return status;
    }
    const int32_t old_frame = frame_of(e->positions, n), new_frame = frame_of(positions, n);
    int64_t n_changed = 0;
    for (int32_t k = 0; k < n; ++k) {
        e->delta[k] = (positions[k] - new_frame) - (e->positions[k] - old_frame);
        n_changed += e->delta[k] != 0;
    }
    if (n_changed > 0) {
        llama_synchronize(e->ctx);
        const int64_t began = ggml_time_us();
        for (int d = 0; d < e->n_devices && status == SX_OK; ++d) {
            status = sx_device_rotate(&e->devices[d], d, e->layers, e->n_layers, e->delta, n,
                    llama_n_threads_batch(e->ctx));
            // From the second device on, a failure leaves the first ones rotated.
            status = status == SX_ERR_MEMORY && d > 0 ? SX_ERR_DEVICE : status;
        }
        e->stats.t_us += ggml_time_us() - began;
        e->stats.n_rows += n_changed;
        e->stats.n_rewrites++;
    }
    if (status == SX_OK) {
        memcpy(e->positions, positions, n * sizeof(int32_t));
    }
    return status;
}

int32_t sx_engine_adopt_key_positions(sx_engine * e, const int32_t * positions, int32_t n) {
    if (n < 0 || n > e->n_ctx) {
        return sx_fail(SX_ERR_ARGUMENT, "%d tokens do not fit a context of %d", n, e->n_ctx);
    }
    const int status = positions ? check_positions(e, positions, n) : SX_OK;
    if (status != SX_OK) {
        return status;
    }
    for (int32_t k = 0; k < n; ++k) {
        e->positions[k] = positions ? positions[k] : k;
    }
    e->n_tokens = n;
    return SX_OK;
}

void sx_engine_truncate(sx_engine * e, int32_t n) {
    if (n < e->n_tokens) {
        e->n_tokens = n < 0 ? 0 : n;
    }
}

// ---- decode ----------------------------------------------------------------------------------------------------

static int check_batch(const sx_engine * e, const struct llama_batch * batch) {
    if (!e->ctx) {
        return sx_fail(SX_ERR_ARGUMENT, "the engine is not attached to a context");
    }
    if (batch->n_tokens < 1 || !batch->token) {
        return sx_fail(SX_ERR_ARGUMENT, "a batch needs at least one token");
    }
    if (batch->n_tokens > e->n_ctx - e->n_tokens) {
        return sx_fail(SX_ERR_ARGUMENT, "%d cached and %d new tokens exceed the context of %d",
                e->n_tokens, batch->n_tokens, e->n_ctx);
    }
    for (int32_t i = 0; i < batch->n_tokens; ++i) {
        if (batch->pos && batch->pos[i] != e->n_tokens + i) {
            return sx_fail(SX_ERR_ARGUMENT, "token %d of the batch has position %d, not %d, where the cache ends",
                    i, batch->pos[i], e->n_tokens + i);
        }
        if (batch->n_seq_id && batch->seq_id && (batch->n_seq_id[i] != 1 || batch->seq_id[i][0] != 0)) {
            return sx_fail(SX_ERR_ARGUMENT, "Self-Extend handles a single sequence, number 0");
        }
    }
    return SX_OK;
}

int32_t sx_engine_decode(sx_engine * e, struct llama_batch batch) {
    const int status = check_batch(e, &batch);
    if (status != SX_OK) {
        return status;
    }
    llama_memory_t memory = llama_get_memory(e->ctx);
    const int32_t n_cached = e->n_tokens, n_total = n_cached + batch.n_tokens;
    const int32_t n_held = llama_memory_seq_pos_max(memory, 0) + 1;
    if (n_held != n_cached) {
        llama_memory_clear(memory, true);
        e->n_tokens = 0;
        return sx_fail(SX_ERR_CACHE, "llama.cpp holds %d tokens, the engine %d", n_held, n_cached);
    }
    for (int l = 0; l < e->n_layers; ++l) {
        e->next_cell[l] = n_cached;
    }
    e->checked_cells = NULL;
    e->framed_at     = -1;
    e->fault         = 0;
    e->decoding      = true;
    const int32_t rc = llama_decode(e->ctx, batch);
    e->decoding      = false;

    if (e->fault == 0 && rc != 0) {
        // A failed decode may have kept some micro-batches.
        llama_memory_seq_rm(memory, 0, n_cached, -1);
        return sx_fail(rc == 2 ? SX_ERR_ABORTED : SX_ERR_DECODE, "llama_decode returned %d", rc);
    }
    for (int l = 0; l < e->n_layers && e->fault == 0; ++l) {
        if (e->next_cell[l] != n_total) {
            fail_in_callback(e, sx_fail(SX_ERR_CACHE, "layer %d stored %d of %d keys", e->layers[l].index,
                    e->next_cell[l] - n_cached, batch.n_tokens));
        }
    }
    if (e->fault != 0) {
        llama_memory_clear(memory, true);
        e->n_tokens = 0;
        return e->fault;
    }
    for (int32_t k = n_cached; k < n_total; ++k) {
        e->positions[k] = k;
    }
    e->n_tokens = n_total;
    return SX_OK;
}
