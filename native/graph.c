#include "graph.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The cache that `node` writes to, if its name is of this form. (A view of a view is one of the whole tensor.)
static struct ggml_tensor * written_cache(const struct ggml_tensor * node, const char * format, int * layer) {
    if (node->op != GGML_OP_SET_ROWS || !node->view_src) {
        return NULL;
    }
    return sscanf(node->view_src->name, format, layer) == 1 ? node->view_src : NULL;
}

struct ggml_tensor * sx_graph_key_cache(const struct ggml_tensor * node, int * layer) {
    return written_cache(node, "cache_k_l%d", layer);
}

bool sx_graph_writes_values(const struct ggml_tensor * node, int * layer) {
    return written_cache(node, "cache_v_l%d", layer) != NULL;
}

const char * sx_graph_other_cache(const struct ggml_tensor * node) {
    const char * name = node->view_src ? node->view_src->name : "";
    const bool known = strncmp(name, "cache_k_l", 9) == 0 || strncmp(name, "cache_v_l", 9) == 0;
    return strncmp(name, "cache_", 6) == 0 && !known ? name : NULL;
}

bool sx_trail_note(struct sx_trail * trail, const struct ggml_tensor * node) {
    if (trail->n == trail->capacity) {
        const int capacity = trail->capacity ? 2 * trail->capacity : 1024;
        const struct ggml_tensor ** nodes = realloc(trail->nodes, capacity * sizeof(*nodes));
        if (!nodes) {
            return false;
        }
        trail->nodes    = nodes;
        trail->capacity = capacity;
    }
    trail->nodes[trail->n++] = node;
    return true;
}

void sx_trail_free(struct sx_trail * trail) {
    free(trail->nodes);
    *trail = (struct sx_trail) { 0 };
}

// The node that `t` is a copy of, if it is one: copies are called DEVICE#NAME#NUMBER, cut to the longest name.
static const struct ggml_tensor * origin(const struct sx_trail * trail, const struct ggml_tensor * t) {
    const char * name = t->op == GGML_OP_NONE ? strchr(t->name, '#') : NULL;
    if (!name) {
        return t;
    }
    name++;
    const char * number = strrchr(name, '#');
    const size_t length = number ? (size_t) (number - name) : strlen(name);
    for (int i = trail->n - 1; i >= 0; --i) {
        const char * candidate = trail->nodes[i]->name;
        if (strncmp(candidate, name, length) == 0 && (!number || candidate[length] == '\0')) {
            return trail->nodes[i];
        }
    }
    return t;
}

// A product with an input of the graph is the Hadamard rotation of quantised keys, any other one a projection.
static bool is_hadamard(const struct ggml_tensor * product) {
    return product->src[0]->op == GGML_OP_NONE && strstr(product->src[0]->name, "attn_inp_k_rot");
}

// Is there a RoPE between `t` and the projections (matrix products) that its values come from?
// The search stops at the projections: behind them lies the residual stream with the RoPE of earlier layers.
static bool is_rotated(const struct sx_trail * trail, const struct ggml_tensor * t, int depth) {
    if (!t || depth > 32) {
        return false;
    }
    t = origin(trail, t);
    if (t->op == GGML_OP_ROPE) {
        return true;
    }
    if (t->op == GGML_OP_MUL_MAT_ID || t->op == GGML_OP_GET_ROWS || (t->op == GGML_OP_MUL_MAT && !is_hadamard(t))) {
        return false;
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (is_rotated(trail, t->src[i], depth + 1)) {
            return true;
        }
    }
    return false;
}

static void read_rope(const struct ggml_tensor * node, struct sx_rope * rope) {
    const int32_t * p = node->op_params;
    rope->n_dims     = p[1];
    rope->mode       = p[2];
    rope->n_ctx_orig = p[4];
    memcpy(&rope->freq_base,  p + 5,  sizeof(float));
    memcpy(&rope->freq_scale, p + 6,  sizeof(float));
    memcpy(&rope->ext_factor, p + 7,  sizeof(float));
    // p[8] is the magnitude that a first rotation applies; a rotation of rotated keys must not repeat it.
    memcpy(&rope->beta_fast,  p + 9,  sizeof(float));
    memcpy(&rope->beta_slow,  p + 10, sizeof(float));
    rope->n_offset    += p[15];
    rope->freq_factors = node->src[2];
}

static bool same_elements(const struct ggml_tensor * a, const struct ggml_tensor * b) {
    return ggml_nelements(a) == ggml_nelements(b) && ggml_is_contiguous(a) && ggml_is_contiguous(b);
}

enum sx_key_path sx_graph_key_rope(
        const struct sx_trail * trail, const struct ggml_tensor * node, struct sx_rope * rope, const char ** op) {
    *rope = (struct sx_rope) { 0 };
    int64_t slice = 0;  // where heads are concatenated: elements of the rotated part
    for (const struct ggml_tensor * t = node->src[0];;) {
        t = origin(trail, t);
        if (!is_rotated(trail, t, 0)) {
            return SX_KEY_NO_ROPE;
        }
        const struct ggml_tensor * next = NULL;
        switch (t->op) {
            case GGML_OP_ROPE:
                if (is_rotated(trail, t->src[0], 0) || (slice && slice != t->ne[0])) {
                    break;
                }
                rope->head_dim = slice ? rope->head_dim : t->ne[0];
                read_rope(t, rope);
                return SX_KEY_ROPE;
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_CONT:
            case GGML_OP_CPY:
                next = same_elements(t, t->src[0]) ? t->src[0] : NULL;
                break;
            case GGML_OP_MUL_MAT:
                rope->n_hadamard = t->src[0]->ne[0];
                next = slice ? NULL : t->src[1];
                break;
            case GGML_OP_CONCAT: {
                // [other elements, rotated elements] of a head, or the other way round
                const int rotated = is_rotated(trail, t->src[1], 0);
                if (t->op_params[0] == 0 && !is_rotated(trail, t->src[!rotated], 0) && (!slice || slice == t->ne[0])) {
                    rope->head_dim  = slice ? rope->head_dim : t->ne[0];
                    rope->n_offset += rotated ? t->src[0]->ne[0] : 0;
                    next  = t->src[rotated];
                    slice = next->ne[0];
                }
                break;
            }
            case GGML_OP_REPEAT:  // one rotated part for all heads
                next = t->ne[0] == t->src[0]->ne[0] ? t->src[0] : NULL;
                break;
            case GGML_OP_RMS_NORM:
            case GGML_OP_L2_NORM:
                next = t->src[0];  // a rotation keeps the length of what it rotates, so it commutes with these
                break;
            default:
                break;
        }
        if (!next) {
            *op = ggml_op_desc(t);
            return SX_KEY_UNKNOWN;
        }
        t = next;
    }
}
