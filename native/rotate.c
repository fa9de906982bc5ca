#include "rotate.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "error.h"
#include "selfextend.h"

// Rows [begin, end) that one ggml operation rotates: all by the same delta, or each by its own.
struct segment {
    int32_t begin, end;
    bool uniform;
    struct ggml_tensor * positions;  // (1) or (end - begin) int32 on the device
    struct ggml_tensor * rows;       // (end - begin) int32 on the device: begin, begin + 1, ...; for types that are cast
};

// From this many equal deltas on, a run is worth an operation of its own: its sines are computed once,
// not once per row. Shorter runs, and gaps of unchanged rows, join a segment with a delta per row.
enum { SHORTEST_UNIFORM_RUN = 64 };

// Scratch of types that ggml's RoPE does not take is limited to this many rows.
enum { CAST_ROWS = 1024 };

static int32_t run_end(const int32_t * delta, int32_t begin, int32_t n_rows) {
    int32_t end = begin + 1;
    while (end < n_rows && delta[end] == delta[begin]) {
        end++;
    }
    return end;
}

// Cut the rows into segments; returns their number. With segments == NULL only counts.
static int32_t cut(const int32_t * delta, int32_t n_rows, int32_t longest, struct segment * segments) {
    int32_t n = 0, mixed_begin = -1, mixed_end = -1;
    for (int32_t begin = 0; begin <= n_rows;) {
        const bool at_end = begin == n_rows;
        const int32_t end = at_end ? n_rows + 1 : run_end(delta, begin, n_rows);
        const bool is_long = end - begin >= SHORTEST_UNIFORM_RUN || at_end;
        if (is_long && mixed_begin >= 0) {
            // Unchanged rows at the end of a mixed segment need not be touched.
            while (delta[mixed_end - 1] == 0) {
                mixed_end--;
            }
            for (int32_t b = mixed_begin; b < mixed_end; b += longest, ++n) {
                if (segments) {
                    segments[n] = (struct segment) { b, b + longest < mixed_end ? b + longest : mixed_end, false, NULL, NULL };
                }
            }
            mixed_begin = -1;
        }
        if (!at_end && is_long && delta[begin] != 0) {
            for (int32_t b = begin; b < end; b += longest, ++n) {
                if (segments) {
                    segments[n] = (struct segment) { b, b + longest < end ? b + longest : end, true, NULL, NULL };
                }
            }
        } else if (!is_long && (delta[begin] != 0 || mixed_begin >= 0)) {
            mixed_begin = mixed_begin < 0 ? begin : mixed_begin;
            mixed_end   = end;
        }
        begin = end;
    }
    return n;
}

// ggml's RoPE takes these types as they are; any other is read as f32, rotated and written back, and so are keys that a
// Hadamard matrix has mixed.
static bool in_place(const struct sx_layer * layer) {
    return (layer->keys->type == GGML_TYPE_F32 || layer->keys->type == GGML_TYPE_F16) && layer->rope.n_hadamard == 0;
}

static struct ggml_tensor * rope_rows(
        struct ggml_context * ctx, struct ggml_tensor * rows, struct ggml_tensor * positions,
        struct ggml_tensor * freq_factors, const struct sx_rope * rope) {
    // ggml multiplies by attn_factor, and with YaRN also by 1 + 0.1 ln(1/scale): a rotation must have magnitude 1.
    const float attn_factor = rope->ext_factor != 0.0f ? 1.0f / (1.0f + 0.1f * logf(1.0f / rope->freq_scale)) : 1.0f;
    struct ggml_tensor * rotated = ggml_rope_ext_inplace(ctx, rows, positions, freq_factors, rope->n_dims, rope->mode,
            rope->n_ctx_orig, rope->freq_base, rope->freq_scale, rope->ext_factor, attn_factor,
            rope->beta_fast, rope->beta_slow);
    return ggml_rope_set_offset(rotated, rope->n_offset);
}

// The product with a Hadamard matrix, which is its own inverse.
static struct ggml_tensor * hadamard_product(
        struct ggml_context * ctx, struct ggml_tensor * hadamard, struct ggml_tensor * x) {
    const int64_t n = hadamard->ne[0];
    struct ggml_tensor * y = ggml_mul_mat(ctx, hadamard, ggml_reshape_2d(ctx, x, n, ggml_nelements(x) / n));
    ggml_mul_mat_set_hint(y, GGML_HINT_SRC0_IS_HADAMARD);
    return ggml_reshape_3d(ctx, y, x->ne[0], x->ne[1], x->ne[2]);
}

// Inputs of a layer's rotation: tensors of the graph, NULL where the layer has no use for them.
struct inputs {
    struct ggml_tensor * freq_factors;  // (n_dims / 2) float
    struct ggml_tensor * hadamard;      // (n_hadamard, n_hadamard) float
};

enum { TENSORS_PER_SEGMENT = 11 };  // most that rotate_segment creates

static struct ggml_tensor * rotate_segment(
        struct ggml_context * ctx, const struct sx_layer * layer, const struct segment * s, struct inputs in) {
    struct ggml_tensor * keys = layer->keys;
    const int64_t head_dim = layer->rope.head_dim, n_heads = keys->ne[0] / head_dim, n_rows = s->end - s->begin;
    const size_t head_size = ggml_row_size(keys->type, head_dim), row_size = keys->nb[1];
    // With one delta for all rows, every (row, head) pair is a head of a single token: one sine table.
    const int64_t heads = s->uniform ? n_heads * n_rows : n_heads, tokens = s->uniform ? 1 : n_rows;
    if (in_place(layer)) {
        struct ggml_tensor * rows = ggml_view_3d(ctx, keys, head_dim, heads, tokens, head_size, head_size * heads,
                s->begin * row_size);
        return rope_rows(ctx, rows, s->positions, in.freq_factors, &layer->rope);
    }
    // Read and written by row number, the way llama.cpp fills its cache, which every backend supports for every type.
    // (Copies to and from views of quantised rows came out wrong on Vulkan.)
    struct ggml_tensor * wide = ggml_reshape_3d(ctx, ggml_get_rows(ctx, keys, s->rows), head_dim, heads, tokens);
    wide = in.hadamard ? hadamard_product(ctx, in.hadamard, wide) : wide;
    wide = rope_rows(ctx, wide, s->positions, in.freq_factors, &layer->rope);
    wide = in.hadamard ? hadamard_product(ctx, in.hadamard, wide) : wide;
    return ggml_set_rows(ctx, keys, ggml_reshape_2d(ctx, wide, keys->ne[0], n_rows), s->rows);
}

static struct ggml_context * graph_context(size_t n_tensors) {
    return ggml_init((struct ggml_init_params) {
        .mem_size   = n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
        .mem_buffer = NULL,
        .no_alloc   = true,
    });
}

static struct ggml_tensor * new_input(struct ggml_tensor * t) {
    ggml_set_input(t);
    return t;
}

static struct inputs new_inputs(struct ggml_context * ctx, const struct sx_layer * layer) {
    const int64_t n = layer->rope.n_hadamard;
    return (struct inputs) {
        .freq_factors = layer->freq_factors
            ? new_input(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, layer->rope.n_dims / 2)) : NULL,
        .hadamard = n ? new_input(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n)) : NULL,
    };
}

// Sylvester's matrix, scaled to be orthonormal, as llama.cpp uses it.
static bool set_hadamard(struct ggml_tensor * t) {
    const int64_t n = t->ne[0];
    float * values = malloc(n * n * sizeof(float));
    if (!values) {
        return false;
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            bool negative = false;
            for (int64_t common = i & j; common; common &= common - 1) {
                negative = !negative;
            }
            values[i * n + j] = (negative ? -1.0f : 1.0f) / sqrtf((float) n);
        }
    }
    ggml_backend_tensor_set(t, values, 0, ggml_nbytes(t));
    free(values);
    return true;
}

int sx_device_init(struct sx_device * device, const struct sx_layer * layer) {
    ggml_backend_buffer_t buffer = layer->keys->buffer;
    device->buffer_type = ggml_backend_buffer_get_type(buffer);
    // Host memory belongs to the CPU even when another device's driver allocated it.
    ggml_backend_dev_t owner = ggml_backend_buffer_is_host(buffer)
        ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)
        : ggml_backend_buft_get_device(device->buffer_type);
    device->backend   = owner ? ggml_backend_dev_init(owner, NULL) : NULL;
    device->allocator = device->backend ? ggml_gallocr_new(ggml_backend_get_default_buffer_type(device->backend)) : NULL;
    struct ggml_context * ctx = graph_context(2 * TENSORS_PER_SEGMENT);
    if (!device->allocator || !ctx) {
        ggml_free(ctx);
        return sx_fail(SX_ERR_DEVICE, "cannot open the device that holds the keys of layer %d", layer->index);
    }
    struct ggml_tensor * one = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    const struct segment probe = { 0, 1, true, one, one };
    rotate_segment(ctx, layer, &probe, new_inputs(ctx, layer));
    bool supported = true;
    for (struct ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        supported = supported && (t->op == GGML_OP_NONE || ggml_backend_supports_op(device->backend, t));
    }
    ggml_free(ctx);
    if (!supported) {
        return sx_fail(SX_ERR_DEVICE, "%s cannot rotate %s keys", ggml_backend_name(device->backend),
                ggml_type_name(layer->keys->type));
    }
    return SX_OK;
}

void sx_device_free(struct sx_device * device) {
    ggml_gallocr_free(device->allocator);
    ggml_backend_free(device->backend);
}

static void set_n_threads(ggml_backend_t backend, int n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    ggml_backend_set_n_threads_t set = (ggml_backend_set_n_threads_t)
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) {
        set(backend, n_threads);
    }
}

static void set_positions(const struct segment * s, const int32_t * delta) {
    ggml_backend_tensor_set(s->positions, delta + s->begin, 0, ggml_nbytes(s->positions));
    if (s->rows) {
        int32_t rows[CAST_ROWS];
        for (int32_t row = s->begin; row < s->end; ++row) {
            rows[row - s->begin] = row;
        }
        ggml_backend_tensor_set(s->rows, rows, 0, ggml_nbytes(s->rows));
    }
}

static int rotate(
        struct sx_device * device, int device_index, const struct sx_layer * layers, int n_layers, bool cast,
        const int32_t * delta, struct segment * segments, int32_t n_segments, struct inputs * inputs) {
    const size_t n_tensors = (size_t) n_segments * (TENSORS_PER_SEGMENT * (size_t) n_layers + 2) + 2 * (size_t) n_layers;
    struct ggml_context * ctx = graph_context(n_tensors);
    if (!ctx) {
        return sx_fail(SX_ERR_MEMORY, "out of memory for a graph of %zu tensors", n_tensors);
    }
    struct ggml_cgraph * graph = ggml_new_graph_custom(ctx, n_tensors, false);
    for (int32_t i = 0; i < n_segments; ++i) {
        const int64_t n = segments[i].end - segments[i].begin;
        segments[i].positions = new_input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, segments[i].uniform ? 1 : n));
        segments[i].rows      = cast ? new_input(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n)) : NULL;
    }
    for (int l = 0; l < n_layers; ++l) {
        if (layers[l].device != device_index) {
            continue;
        }
        inputs[l] = new_inputs(ctx, &layers[l]);
        for (int32_t i = 0; i < n_segments; ++i) {
            ggml_build_forward_expand(graph, rotate_segment(ctx, &layers[l], &segments[i], inputs[l]));
        }
    }
    if (!ggml_gallocr_alloc_graph(device->allocator, graph)) {
        ggml_free(ctx);
        return sx_fail(SX_ERR_MEMORY, "out of memory on %s for rotating keys", ggml_backend_name(device->backend));
    }
    for (int32_t i = 0; i < n_segments; ++i) {
        set_positions(&segments[i], delta);
    }
    for (int l = 0; l < n_layers; ++l) {
        if (inputs[l].freq_factors) {
            ggml_backend_tensor_set(inputs[l].freq_factors, layers[l].freq_factors, 0, ggml_nbytes(inputs[l].freq_factors));
        }
        if (inputs[l].hadamard && !set_hadamard(inputs[l].hadamard)) {
            ggml_free(ctx);
            return sx_fail(SX_ERR_MEMORY, "out of memory");
        }
    }
    const enum ggml_status status = ggml_backend_graph_compute(device->backend, graph);
    ggml_free(ctx);
    if (status != GGML_STATUS_SUCCESS) {
        return sx_fail(SX_ERR_DEVICE, "%s failed to rotate keys (status %d)", ggml_backend_name(device->backend), status);
    }
    return SX_OK;
}

int sx_device_rotate(
        struct sx_device * device, int device_index, const struct sx_layer * layers, int n_layers,
        const int32_t * delta, int32_t n_rows, int n_threads) {
    bool cast = false;
    for (int l = 0; l < n_layers; ++l) {
        cast = cast || (layers[l].device == device_index && !in_place(&layers[l]));
    }
    const int32_t longest = cast ? CAST_ROWS : n_rows;
    const int32_t n_segments = cut(delta, n_rows, longest, NULL);
    if (n_segments == 0) {
        return SX_OK;
    }
    struct segment * segments = malloc(n_segments * sizeof(*segments));
    struct inputs * inputs = calloc(n_layers, sizeof(*inputs));
    int status = SX_ERR_MEMORY;
    if (segments && inputs) {
        cut(delta, n_rows, longest, segments);
        set_n_threads(device->backend, n_threads);
        status = rotate(device, device_index, layers, n_layers, cast, delta, segments, n_segments, inputs);
    } else {
        sx_fail(status, "out of memory for rotating %d rows", n_rows);
    }
    free(inputs);
    free(segments);
    return status;
}
