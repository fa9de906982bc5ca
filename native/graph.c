#include "graph.h"

#include <stdio.h>
#include <string.h>

static struct ggml_tensor * root_of(struct ggml_tensor * t) {
    while (t->view_src) {
        t = t->view_src;
    }
    return t;
}

struct ggml_tensor * sx_graph_key_cache(const struct ggml_tensor * node, int * layer) {
    if (node->op != GGML_OP_SET_ROWS || !node->view_src) {
        return NULL;
    }
    struct ggml_tensor * cache = root_of(node->view_src);
    return sscanf(cache->name, "cache_k_l%d", layer) == 1 ? cache : NULL;
}

static bool only_reshapes(const struct ggml_tensor * t) {
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE || t->op == GGML_OP_CONT;
}

// Is there a RoPE between `t` and the projections (matrix products) that its values come from?
// The search stops at the projections: behind them lies the residual stream with the RoPE of earlier layers.
static bool rotated_somewhere(const struct ggml_tensor * t, int depth) {
    if (!t || depth > 32 || t->op == GGML_OP_NONE || t->op == GGML_OP_MUL_MAT_ID || t->op == GGML_OP_GET_ROWS) {
        return false;
    }
    if (t->op == GGML_OP_ROPE) {
        return true;
    }
    if (t->op == GGML_OP_MUL_MAT) {
        // A product with an input of the graph is the Hadamard rotation of quantised keys, not a projection.
        return t->src[0]->op == GGML_OP_NONE && strstr(t->src[0]->name, "k_rot") && rotated_somewhere(t->src[1], depth + 1);
    }
    for (int i = 0; i < GGML_MAX_SRC; ++i) {
        if (rotated_somewhere(t->src[i], depth + 1)) {
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
    rope->n_offset     = p[15];
    rope->head_dim     = node->ne[0];
    rope->positions    = node->src[1];
    rope->freq_factors = node->src[2];
}

enum sx_key_path sx_graph_key_rope(const struct ggml_tensor * node, struct sx_rope * rope, const char ** op) {
    const struct ggml_tensor * t = node->src[0];
    while (t && only_reshapes(t)) {
        t = t->src[0];
    }
    if (t && t->op == GGML_OP_ROPE) {
        read_rope(t, rope);
        return SX_KEY_ROPE;
    }
    if (rotated_somewhere(t, 0)) {
        *op = ggml_op_desc(t);
        return SX_KEY_UNKNOWN;
    }
    return SX_KEY_NO_ROPE;
}
