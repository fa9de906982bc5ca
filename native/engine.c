// The engine: which position every cached key stands for, and the calls into llama.cpp that keep it true.
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "layers.h"
#include "selfextend.h"
#include "verify.h"

enum { MAX_POSITION_INPUTS = 64 };

struct sx_engine {
    struct llama_context * ctx;  // NULL until attached
    int32_t   n_ctx;
    int32_t   n_tokens;          // cached tokens
    int32_t * positions;         // (n_ctx) key position of each cached token
    int32_t * delta;             // (n_ctx) scratch: rotation of each row, in positions
    int32_t * read_buffer;       // (2 * n_ctx) scratch for index tensors read from a device

    struct sx_layers layers;     // those whose keys are rewritten
    int32_t * next_cell;         // (layers.n) during a decode: the cell that the layer writes next

    bool      finding;           // the first warm-up decode is running: collect layers
    struct sx_probe * probe;     // a warm-up decode is running: note what it writes
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
    sx_layers_free(&e->layers);
    free(e->next_cell);
    free(e->positions);
    free(e->delta);
    free(e->read_buffer);
    free(e);
}

// The frame: what is subtracted from every position before it becomes an angle. Layers with sliding attention, whose
// keys stay as they are, share the position input with the others: with such layers there is no frame.
static int32_t frame_of(const sx_engine * e, const int32_t * positions, int32_t n) {
    return n > 0 && !e->layers.any_local ? positions[0] : 0;
}

// ---- graph callback --------------------------------------------------------------------------------------------

static void fail_in_callback(sx_engine * e, int status) {
    e->fault = e->fault ? e->fault : status;
}

// The keys of tokens next, next + 1, ... must go to the cells of the same numbers.
static void check_cells(sx_engine * e, const struct ggml_tensor * node, const struct ggml_tensor * keys) {
    int l = 0;
    while (l < e->layers.n && e->layers.layer[l].keys != keys) {
        l++;
    }
    if (l == e->layers.n) {
        return;  // a layer whose keys stay as they are
    }
    const struct ggml_tensor * cells = node->src[1];
    const int64_t n = cells->ne[0];
    const int32_t at = e->next_cell[l];
    if (n > e->n_ctx - at) {
        fail_in_callback(e, sx_fail(SX_ERR_CACHE, "layer %d writes more keys than the cache holds",
                e->layers.layer[l].index));
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
    for (int l = 1; l < e->layers.n; ++l) {
        begin = e->next_cell[l] < begin ? e->next_cell[l] : begin;
    }
    return begin;
}

// Subtract the frame from the positions that a RoPE node is about to read.
static void move_into_frame(sx_engine * e, struct ggml_tensor * positions) {
    const int32_t frame = frame_of(e, e->positions, e->n_tokens);
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
        if (strstr(node->src[i]->name, "inp_pos")) {
            return true;
        }
    }
    return false;
}

static void find_layers(sx_engine * e, const struct ggml_tensor * node) {
    const int status = reads_positions_outside_rope(node)
        ? sx_fail(SX_ERR_MODEL, "positions are used outside RoPE (by %s)", ggml_op_desc(node))
        : sx_layers_look_at(&e->layers, node);
    if (status != SX_OK) {
        fail_in_callback(e, status);
    }
}

bool sx_engine_eval_callback(struct ggml_tensor * node, bool ask, void * user_data) {
    sx_engine * e = user_data;
    int layer = 0;
    if (e->fault) {
        return false;
    }
    if (e->probe) {
        if (ask && e->finding) {
            find_layers(e, node);
        }
        const int status = ask ? SX_OK : sx_probe_note(e->probe, node);
        if (status != SX_OK) {
            fail_in_callback(e, status);
        }
        return e->fault == 0;
    }
    if (!ask || !e->decoding) {
        return false;
    }
    if (node->op == GGML_OP_ROPE) {
        move_into_frame(e, node->src[1]);
    } else {
        const struct ggml_tensor * keys = sx_graph_key_cache(node, &layer);
        if (keys) {
            check_cells(e, node, keys);
        }
    }
    return false;
}

// ---- attach ----------------------------------------------------------------------------------------------------

int32_t sx_model_check(const struct llama_model * model) {
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
    return SX_OK;
}

static int check_context(const sx_engine * e, struct llama_context * ctx) {
    const int status = sx_model_check(llama_get_model(ctx));
    if (status != SX_OK) {
        return status;
    }
    if (!llama_get_memory(ctx)) {
        return sx_fail(SX_ERR_MODEL, "the model is not a plain decoder");
    }
    if (llama_n_seq_max(ctx) != 1) {
        return sx_fail(SX_ERR_MODEL, "the context is made for %u sequences; Self-Extend handles one", llama_n_seq_max(ctx));
    }
    if (llama_n_ctx(ctx) != (uint32_t) e->n_ctx) {
        return sx_fail(SX_ERR_ARGUMENT, "the engine is made for %d tokens, the context for %u", e->n_ctx, llama_n_ctx(ctx));
    }
    return SX_OK;
}

// Decode a token at `position`, and let the callback note what that writes; at position 0 also the layers.
static int probe(sx_engine * e, struct llama_context * ctx, struct sx_probe * probe, llama_pos position) {
    e->finding = position == 0;
    e->probe   = probe;
    const int status = sx_decode_probe(ctx, position);
    e->probe   = NULL;
    return e->fault ? e->fault : status;
}

static int find_and_verify(sx_engine * e, struct llama_context * ctx) {
    struct sx_probe here = { 0 }, there = { 0 };
    int status = probe(e, ctx, &here, 0);
    status = status ? status : sx_layers_settle(&e->layers, ctx);
    llama_memory_clear(llama_get_memory(ctx), true);
    status = status ? status : probe(e, ctx, &there, SX_PROBE_POSITION);
    status = status ? status : sx_layers_verify(&e->layers, &here, &there, llama_n_threads(ctx));
    sx_probe_free(&there);
    sx_probe_free(&here);
    return status;
}

static int prepare_decodes(sx_engine * e) {
    if (e->layers.n == 0 && !e->layers.any_local) {
        return sx_fail(SX_ERR_MODEL, "no layer writes rotated keys to a cache that this library recognises");
    }
    e->next_cell = allocate(e->layers.n, sizeof(int32_t));
    return e->next_cell ? SX_OK : sx_fail(SX_ERR_MEMORY, "out of memory");
}

int32_t sx_engine_attach(sx_engine * e, struct llama_context * ctx) {
    if (!ctx) {
        return sx_fail(SX_ERR_ARGUMENT, "there is no context");
    }
    if (e->ctx || e->layers.n > 0) {
        return sx_fail(SX_ERR_ARGUMENT, "the engine has been attached before");
    }
    int status = check_context(e, ctx);
    if (status != SX_OK) {
        return status;
    }
    status = find_and_verify(e, ctx);
    llama_memory_clear(llama_get_memory(ctx), true);
    llama_perf_context_reset(ctx);
    if (status == SX_OK) {
        sx_layers_drop_unrotated(&e->layers);
        status = prepare_decodes(e);
    }
    e->fault = 0;
    e->ctx   = status == SX_OK ? ctx : NULL;
    return status;
}

// ---- positions -------------------------------------------------------------------------------------------------

int32_t sx_engine_n_layers(const sx_engine * e) {
    return e->layers.n;
}

bool sx_engine_has_frame(const sx_engine * e) {
    return !e->layers.any_local;
}

const char * sx_engine_device_name(const sx_engine * e, int32_t i) {
    return i >= 0 && i < e->layers.n_devices ? ggml_backend_name(e->layers.device[i].backend) : NULL;
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
    const int32_t old_frame = frame_of(e, e->positions, n), new_frame = frame_of(e, positions, n);
    int64_t n_changed = 0;
    for (int32_t k = 0; k < n; ++k) {
        e->delta[k] = (positions[k] - new_frame) - (e->positions[k] - old_frame);
        n_changed += e->delta[k] != 0;
    }
    if (n_changed > 0 && e->layers.n > 0) {
        llama_synchronize(e->ctx);
        const int64_t began = ggml_time_us();
        for (int d = 0; d < e->layers.n_devices && status == SX_OK; ++d) {
            status = sx_device_rotate(&e->layers.device[d], d, e->layers.layer, e->layers.n, e->delta, n,
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
    for (int l = 0; l < e->layers.n; ++l) {
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
    for (int l = 0; l < e->layers.n && e->fault == 0; ++l) {
        if (e->next_cell[l] != n_total) {
            fail_in_callback(e, sx_fail(SX_ERR_CACHE, "layer %d stored %d of %d keys", e->layers.layer[l].index,
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
