// The graph reader on graphs that no model made: every way from a RoPE to a cache that it knows, every one that it must
// refuse, and random ones, of which it may say what it likes but not read where nothing is.
#include <string.h>

#include "check.h"
#include "verify.h"

enum { HEAD = 16, HEADS = 4, TOKENS = 3, N_RANDOM = 20000 };

static struct ggml_context * ctx;

static struct ggml_tensor * tensor(int64_t a, int64_t b, int64_t c) {
    return ggml_new_tensor_3d(ctx, GGML_TYPE_F32, a, b, c);
}

static struct ggml_tensor * named(struct ggml_tensor * t, const char * name) {
    return ggml_set_name(t, name);
}

// (n, heads, TOKENS) values as they come from a layer's projection.
static struct ggml_tensor * projected(int64_t n, int64_t heads) {
    struct ggml_tensor * product = ggml_mul_mat(ctx, tensor(8, n * heads, 1), tensor(8, TOKENS, 1));
    return ggml_reshape_3d(ctx, product, n, heads, TOKENS);
}

static struct ggml_tensor * rotated(struct ggml_tensor * t) {
    struct ggml_tensor * positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, t->ne[2]);
    return ggml_rope_ext(ctx, t, positions, NULL, (int) t->ne[0], GGML_ROPE_TYPE_NEOX, 77, 5e4f, 0.5f, 1.0f, 1.0f, 32.0f, 2.0f);
}

static struct ggml_tensor * hadamard(struct ggml_tensor * t, int64_t n) {
    struct ggml_tensor * flat = ggml_reshape_2d(ctx, t, n, ggml_nelements(t) / n);
    return ggml_mul_mat(ctx, named(tensor(n, n, 1), "attn_inp_k_rot"), flat);
}

static struct ggml_tensor * write_to(struct ggml_tensor * keys, const char * name) {
    const int64_t n = ggml_nelements(keys) / TOKENS;
    struct ggml_tensor * cache = ggml_view_2d(ctx, named(tensor(n, 8, 1), name), n, 8, n * sizeof(float), 0);
    const bool is_whole = ggml_is_contiguous(keys);
    struct ggml_tensor * rows = is_whole ? ggml_reshape_2d(ctx, keys, n, TOKENS) : tensor(n, TOKENS, 1);
    struct ggml_tensor * node = ggml_set_rows(ctx, cache, rows, ggml_new_tensor_1d(ctx, GGML_TYPE_I64, TOKENS));
    node->src[0] = is_whole ? rows : keys;
    return node;
}

static struct sx_rope rope;
static const char * op;

static enum sx_key_path follow(struct sx_trail * trail, struct ggml_tensor * keys) {
    static struct sx_trail none;
    op = "";
    return sx_graph_key_rope(trail ? trail : &none, write_to(keys, "cache_k_l5"), &rope, &op);
}

static bool is_refused(struct ggml_tensor * keys, const char * because) {
    return follow(NULL, keys) == SX_KEY_UNKNOWN && strcmp(op, because) == 0;
}

static bool is_rope(struct ggml_tensor * keys, int64_t head_dim, int32_t n_dims, int32_t n_offset) {
    return follow(NULL, keys) == SX_KEY_ROPE && rope.head_dim == head_dim && rope.n_dims == n_dims && rope.n_offset == n_offset;
}

// ---- which nodes write to a cache --------------------------------------------------------------------------------

static void check_caches(void) {
    int layer = -1;
    struct ggml_tensor * keys = projected(HEAD, HEADS), * node = write_to(keys, "cache_k_l12");
    CHECK(sx_graph_key_cache(node, &layer) == node->view_src && layer == 12);
    CHECK(!sx_graph_writes_values(node, &layer) && !sx_graph_other_cache(node));
    node = write_to(keys, "cache_v_l7");
    CHECK(!sx_graph_key_cache(node, &layer) && sx_graph_writes_values(node, &layer) && layer == 7);
    CHECK(!sx_graph_other_cache(node));
    CHECK(!sx_graph_key_cache(keys, &layer) && !sx_graph_other_cache(tensor(1, 1, 1)));
    node->view_src = NULL;
    CHECK(!sx_graph_key_cache(node, &layer) && !sx_graph_writes_values(node, &layer));
    node = write_to(keys, "cache_r_l1");
    CHECK(!sx_graph_key_cache(node, &layer) && strcmp(sx_graph_other_cache(node), "cache_r_l1") == 0);
    CHECK(!sx_graph_other_cache(write_to(keys, "something")));
}

// ---- known and unknown ways --------------------------------------------------------------------------------------

static void check_ways(void) {
    struct ggml_tensor * keys = rotated(projected(HEAD, HEADS));
    CHECK(is_rope(keys, HEAD, HEAD, 0));
    CHECK(rope.mode == GGML_ROPE_TYPE_NEOX && rope.n_ctx_orig == 77 && rope.freq_base == 5e4f && rope.freq_scale == 0.5f);
    CHECK(rope.ext_factor == 1.0f && rope.beta_fast == 32.0f && rope.beta_slow == 2.0f && rope.n_hadamard == 0);
    CHECK(!rope.freq_factors);
    CHECK(follow(NULL, projected(HEAD, HEADS)) == SX_KEY_NO_ROPE);
    CHECK(follow(NULL, ggml_get_rows(ctx, tensor(HEAD, 9, 1), ggml_new_tensor_1d(ctx, GGML_TYPE_I32, TOKENS))) == SX_KEY_NO_ROPE);
    struct ggml_tensor * factors = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, HEAD / 2);
    keys = ggml_rope_ext(ctx, projected(HEAD, HEADS), ggml_new_tensor_1d(ctx, GGML_TYPE_I32, TOKENS), factors, HEAD - 4, 0, 1,
            1e4f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
    CHECK(is_rope(ggml_rope_set_offset(keys, 4), HEAD, HEAD - 4, 4) && rope.freq_factors == factors);

    // What commutes with a rotation, or undoes itself.
    keys = rotated(projected(HEAD, HEADS));
    CHECK(is_rope(ggml_rms_norm(ctx, keys, 1e-5f), HEAD, HEAD, 0) && is_rope(ggml_l2_norm(ctx, keys, 1e-5f), HEAD, HEAD, 0));
    CHECK(is_rope(ggml_cpy(ctx, keys, tensor(HEAD, HEADS, TOKENS)), HEAD, HEAD, 0));
    CHECK(is_rope(ggml_cont(ctx, keys), HEAD, HEAD, 0));
    CHECK(is_rope(hadamard(keys, 8), HEAD, HEAD, 0) && rope.n_hadamard == 8);
    // A product that only looks like it is a projection, behind which no RoPE counts.
    CHECK(follow(NULL, ggml_mul_mat(ctx, named(tensor(HEAD, HEAD, 1), "w"), keys)) == SX_KEY_NO_ROPE);
    struct ggml_tensor * experts = ggml_mul_mat_id(ctx, tensor(HEAD, 9, 2), tensor(HEAD, 2, TOKENS),
            ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, TOKENS));
    CHECK(follow(NULL, experts) == SX_KEY_NO_ROPE);
    CHECK(follow(NULL, ggml_mul_mat(ctx, named(ggml_dup(ctx, tensor(HEAD, HEAD, 1)), "attn_inp_k_rot"), keys)) == SX_KEY_NO_ROPE);
    CHECK(is_refused(ggml_scale(ctx, keys, 2.0f), "SCALE"));
    CHECK(is_refused(ggml_add(ctx, tensor(HEAD, HEADS, TOKENS), keys), "ADD"));
    CHECK(is_refused(ggml_view_3d(ctx, keys, HEAD / 2, HEADS, TOKENS, keys->nb[1], keys->nb[2], 0), "VIEW"));
    CHECK(is_refused(ggml_view_3d(ctx, keys, HEADS, HEAD, TOKENS, keys->nb[1], keys->nb[2], 0), "VIEW"));
    CHECK(is_refused(ggml_cont(ctx, ggml_permute(ctx, keys, 1, 0, 2, 3)), "CONT"));
    CHECK(is_refused(rotated(rotated(projected(HEAD, HEADS))), "ROPE"));
    struct ggml_tensor * far = keys;
    for (int i = 0; i < 40; ++i) {
        far = ggml_rms_norm(ctx, far, 1e-5f);
    }
    CHECK(follow(NULL, far) == SX_KEY_NO_ROPE);  // and its probes will differ: refused by the verification

    // Heads of a rotated and another part, in either order; the rotated part one for all heads.
    struct ggml_tensor * part = rotated(projected(4, HEADS)), * rest = projected(12, HEADS);
    CHECK(is_rope(ggml_concat(ctx, part, rest, 0), HEAD, 4, 0) && is_rope(ggml_concat(ctx, rest, part, 0), HEAD, 4, 12));
    CHECK(is_rope(ggml_concat(ctx, projected(8, HEADS), ggml_concat(ctx, projected(4, HEADS), part, 0), 0), HEAD, 4, 12));
    struct ggml_tensor * one = rotated(projected(4, 1));
    CHECK(is_rope(ggml_concat(ctx, rest, ggml_repeat(ctx, one, tensor(4, HEADS, TOKENS)), 0), HEAD, 4, 12));
    CHECK(is_refused(ggml_repeat(ctx, one, tensor(8, HEADS, TOKENS)), "REPEAT"));
    CHECK(is_refused(ggml_concat(ctx, part, projected(4, HEADS), 1), "CONCAT"));
    CHECK(is_refused(ggml_concat(ctx, part, rotated(projected(12, HEADS)), 0), "CONCAT"));
    // A part that is no whole head of what was rotated, or of what was joined.
    CHECK(is_refused(ggml_concat(ctx, rest, ggml_reshape_3d(ctx, rotated(projected(8, 2)), 4, HEADS, TOKENS), 0), "ROPE"));
    struct ggml_tensor * joined = ggml_concat(ctx, rotated(projected(4, 2)), projected(4, 2), 0);  // 8 for each of 2
    CHECK(is_refused(ggml_concat(ctx, rest, ggml_reshape_3d(ctx, joined, 4, HEADS, TOKENS), 0), "CONCAT"));
    CHECK(is_refused(ggml_concat(ctx, rest, ggml_reshape_3d(ctx, hadamard(part, 4), 4, HEADS, TOKENS), 0), "MUL_MAT"));
}

// ---- copies between devices ----------------------------------------------------------------------------------------

static void check_copies(void) {
    struct sx_trail trail = { 0 };
    struct ggml_tensor * keys = named(rotated(projected(HEAD, HEADS)), "Kcur-5");
    for (int i = 0; i < 1500; ++i) {  // more than the first allocation
        CHECK(sx_trail_note(&trail, i == 700 ? keys : named(tensor(1, 1, 1), i == 701 ? "Kcur-55" : "other")));
    }
    const char * const found[] = { "GPU0#Kcur-5#0", "GPU0#Kcur-5#12" }, * const lost[] = { "GPU0#Kcur-4#0", "Kcur-5", "GPU0#" };
    for (int i = 0; i < 2; ++i) {
        CHECK(follow(&trail, named(tensor(HEAD, HEADS, TOKENS), found[i])) == SX_KEY_ROPE);
    }
    for (int i = 0; i < 3; ++i) {
        CHECK(follow(&trail, named(tensor(HEAD, HEADS, TOKENS), lost[i])) == SX_KEY_NO_ROPE);
    }
    CHECK(follow(&trail, named(ggml_dup(ctx, tensor(HEAD, HEADS, TOKENS)), "GPU0#Kcur-5#0")) == SX_KEY_NO_ROPE);
    // A name that is cut before its number: the latest node that begins so.
    named(keys, "the_name_of_a_node_that_is_so_long_that_its_copy_has_no_number");
    CHECK(follow(&trail, named(tensor(HEAD, HEADS, TOKENS), "GPU0#the_name_of_a_node_that_is_so_long_that_its_copy_h")) == SX_KEY_ROPE);
    sx_trail_free(&trail);
    CHECK(trail.n == 0 && trail.nodes == NULL);
}

// ---- layers that are refused -------------------------------------------------------------------------------------------

static bool is_no_layer(struct ggml_tensor * node, const char * because) {
    struct sx_layers layers = { 0 };
    const bool is_refused = sx_layers_look_at(&layers, node) == SX_ERR_MODEL && strstr(sx_last_error(), because);
    CHECK(layers.n == 0);
    sx_layers_free(&layers);
    return is_refused;
}

static void check_layers(void) {
    struct ggml_tensor * keys = rotated(projected(HEAD, HEADS));
    CHECK(is_no_layer(write_to(keys, "cache_r_l1"), "more than keys and values of the text (cache_r_l1)"));
    CHECK(is_no_layer(write_to(ggml_scale(ctx, keys, 2.0f), "cache_k_l1"), "layer 1 passes its rotated keys through SCALE"));
    struct ggml_tensor * sections = rotated(projected(HEAD, HEADS));
    sections->op_params[2] = GGML_ROPE_TYPE_MROPE;
    CHECK(is_no_layer(write_to(sections, "cache_k_l2"), "layer 2 uses multi-dimensional RoPE (type 8)"));

    struct sx_layers layers = { 0 };
    CHECK(sx_layers_look_at(&layers, keys) == SX_OK && layers.n == 0);
    CHECK(sx_layers_look_at(&layers, write_to(keys, "cache_k_l3")) == SX_OK);
    CHECK(sx_layers_look_at(&layers, write_to(keys, "cache_v_l4")) == SX_OK);
    CHECK(sx_layers_look_at(&layers, write_to(projected(HEAD, HEADS), "cache_k_l4")) == SX_OK && layers.n == 2);
    CHECK(sx_layers_look_at(&layers, write_to(keys, "cache_k_l3")) == SX_ERR_MODEL);
    CHECK(strcmp(sx_last_error(), "layer 3 keeps a second cache of keys (sparse attention)") == 0);
    sx_layers_drop_unrotated(&layers);
    CHECK(layers.n == 1 && layers.layer[0].index == 3);
    sx_layers_free(&layers);

    struct sx_probe probe = { 0 };
    CHECK(sx_probe_note(&probe, keys) == SX_OK && probe.n == 0);
    struct ggml_tensor * node = write_to(ggml_permute(ctx, keys, 1, 0, 2, 3), "cache_v_l6");
    CHECK(sx_probe_note(&probe, node) == SX_ERR_MODEL && strstr(sx_last_error(), "layer 6 writes its keys in an order"));
}

// ---- random graphs -------------------------------------------------------------------------------------------------

static uint32_t state = 1;

static int any(int n) {
    state = state * 1664525u + 1013904223u;
    return (int) ((state >> 8) % (uint32_t) n);
}

static struct ggml_tensor * step(struct ggml_tensor * t) {
    switch (any(11)) {
        case 0: return t->ne[0] % 2 == 0 && ggml_is_contiguous(t) ? rotated(t) : t;
        case 1: return ggml_rms_norm(ctx, t, 1e-5f);
        case 2: return ggml_cont(ctx, t);
        case 3: return ggml_concat(ctx, t, tensor(2 * (1 + any(4)), t->ne[1], t->ne[2]), 0);
        case 4: return ggml_concat(ctx, rotated(projected(2 * (1 + any(4)), t->ne[1])), t, 0);
        case 5: return t->ne[1] == 1 ? ggml_repeat(ctx, t, tensor(t->ne[0], HEADS, t->ne[2])) : t;
        case 6: return ggml_is_contiguous(t) && t->ne[0] % 4 == 0 && t->ne[2] == TOKENS
                    ? ggml_reshape_3d(ctx, hadamard(t, 4), t->ne[0], t->ne[1], t->ne[2]) : t;
        case 7: return ggml_permute(ctx, t, 1, 0, 2, 3);
        case 8: return t->ne[0] % 4 == 0 ? ggml_view_3d(ctx, t, t->ne[0] / 2, t->ne[1], t->ne[2], t->nb[1], t->nb[2], 0) : t;
        case 9: return ggml_scale(ctx, ggml_cont(ctx, t), 3.0f);
        default: return ggml_is_contiguous(t) && t->ne[0] % 4 == 0
                    ? ggml_reshape_3d(ctx, t, t->ne[0] / 2, t->ne[1] * 2, t->ne[2]) : t;
    }
}

static void check_random(void) {
    int n_found = 0, n_refused = 0;
    for (int i = 0; i < N_RANDOM; ++i) {
        ggml_reset(ctx);
        struct ggml_tensor * t = projected(2 * (1 + any(8)), any(2) ? HEADS : 1);
        for (int n = any(8); n > 0; --n) {
            t = step(t);
        }
        if (ggml_nelements(t) % TOKENS || !ggml_is_contiguous(t)) {
            t = ggml_cont(ctx, t);
        }
        const enum sx_key_path path = follow(NULL, t);
        n_found   += path == SX_KEY_ROPE;
        n_refused += path == SX_KEY_UNKNOWN;
        if (path == SX_KEY_ROPE) {
            CHECK(rope.n_dims > 0 && rope.n_offset >= 0 && rope.n_offset + rope.n_dims <= rope.head_dim);
        }
        CHECK((path == SX_KEY_UNKNOWN) == (op[0] != '\0'));
    }
    CHECK(n_found > N_RANDOM / 20 && n_refused > N_RANDOM / 20);
}

int main(void) {
    ctx = ggml_init((struct ggml_init_params) { .mem_size = 4 << 20, .no_alloc = true });
    CHECK(ctx);
    check_caches();
    check_ways();
    check_copies();
    check_layers();
    check_random();
    ggml_free(ctx);
    puts("ok");
    return 0;
}
