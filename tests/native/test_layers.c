// The verification at load: layers described rightly pass, layers described wrongly are refused, and so are caches that a
// device rotates wrongly.
// usage: test_layers MODEL.gguf K_TYPE... (numbers of enum ggml_type)
#define _GNU_SOURCE  // RTLD_NEXT
#include <dlfcn.h>
#include <string.h>

#include "check.h"
#include "error.h"
#include "verify.h"

enum { N_CTX = 256 };

struct search {
    struct sx_layers layers;
    struct sx_probe  here, there;  // what the decodes at positions 0 and SX_PROBE_POSITION write
    struct sx_probe * probe;       // the running one
};

static bool collect(struct ggml_tensor * node, bool ask, void * user_data) {
    struct search * s = user_data;
    if (ask && s->probe == &s->here) {
        CHECK(sx_layers_look_at(&s->layers, node) == SX_OK);
    }
    if (!ask) {
        CHECK(sx_probe_note(s->probe, node) == SX_OK);
    }
    return true;
}

// ---- a device that leaves keys where they are, unless they are f32 -----------------------------------------------

static bool is_lazy;

// Whether values come straight from a cache that is not f32.
static bool is_of_cache(const struct ggml_tensor * t) {
    while (t && t->op != GGML_OP_GET_ROWS && t->type == GGML_TYPE_F32) {
        t = t->op == GGML_OP_MUL_MAT ? t->src[1] : t->src[0];
    }
    return t && (t->type != GGML_TYPE_F32 || t->src[0]->type != GGML_TYPE_F32);
}

// In place of ggml's own, for the library that is part of this program.
struct ggml_tensor * ggml_rope_ext_inplace(
        struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b, struct ggml_tensor * c, int n_dims,
        int mode, int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor,
        float beta_fast, float beta_slow) {
    static struct ggml_tensor * (* rope)(
            struct ggml_context *, struct ggml_tensor *, struct ggml_tensor *, struct ggml_tensor *, int, int, int, float,
            float, float, float, float, float);
    if (!rope) {
        void * symbol = dlsym(RTLD_NEXT, "ggml_rope_ext_inplace");
        CHECK(symbol);
        memcpy(&rope, &symbol, sizeof(rope));
    }
    const bool stay = is_lazy && is_of_cache(a);
    return rope(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, stay ? 0.0f : freq_scale, stay ? 0.0f : ext_factor,
            stay ? 1.0f : attn_factor, beta_fast, beta_slow);
}

// ---- wrong descriptions of a layer; false: this layer cannot be described so ------------------------------------

static bool wrong_base(struct sx_layer * layer) {
    layer->rope.freq_base *= 2.0f;
    return true;
}

static bool wrong_scale(struct sx_layer * layer) {
    layer->rope.freq_scale *= 1.02f;
    return true;
}

static bool wrong_pairs(struct sx_layer * layer) {
    struct sx_rope * rope = &layer->rope;
    rope->mode = rope->mode == GGML_ROPE_TYPE_NEOX ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX;
    return true;
}

static bool half_of_the_head(struct sx_layer * layer) {
    layer->rope.n_dims /= 2;
    return true;
}

static bool no_rope(struct sx_layer * layer) {
    layer->rope.n_dims = 0;
    return true;
}

static bool wrong_place(struct sx_layer * layer) {
    struct sx_rope * rope = &layer->rope;
    rope->n_offset += rope->n_offset > 0 ? -2 : 2;
    return rope->n_offset + rope->n_dims <= rope->head_dim;
}

static bool yarn_or_not(struct sx_layer * layer) {
    struct sx_rope * rope = &layer->rope;
    rope->freq_scale = rope->ext_factor == 0.0f ? 0.5f * rope->freq_scale : rope->freq_scale;
    rope->ext_factor = rope->ext_factor == 0.0f ? 1.0f : 0.0f;
    return true;
}

static bool hadamard_or_not(struct sx_layer * layer) {
    layer->rope.n_hadamard = layer->rope.n_hadamard ? 0 : 16;
    return layer->keys->ne[0] % 16 == 0;
}

// The slower half of the pairs turns half as fast.
static bool wrong_factors(struct sx_layer * layer) {
    const int n = layer->rope.n_dims / 2;
    float * factors = malloc(n * sizeof(float));
    for (int i = 0; i < n; ++i) {
        factors[i] = (layer->freq_factors ? layer->freq_factors[i] : 1.0f) * (i < n / 2 ? 1.0f : 2.0f);
    }
    free(layer->freq_factors);
    layer->freq_factors = factors;
    return true;
}

static bool (* const WRONG[])(struct sx_layer *) = {
    wrong_base, wrong_scale, wrong_pairs, half_of_the_head, no_rope, wrong_place, yarn_or_not, hadamard_or_not,
    wrong_factors,
};

// ---- verdicts --------------------------------------------------------------------------------------------------

static int verify(struct search * s) {
    return sx_layers_verify(&s->layers, &s->here, &s->there, 1);
}

static void check_refused(struct search * s, const struct sx_layer * layer, const char * what, int number) {
    char message[64];
    snprintf(message, sizeof(message), "layer %d does not hold its keys as its compute graph says", layer->index);
    const int status = verify(s);
    if (status != SX_ERR_MODEL || !strstr(sx_last_error(), message)) {
        fprintf(stderr, "%s keys, %s %d: status %d, %s\n", ggml_type_name(layer->keys->type), what, number, status,
                sx_last_error());
        exit(1);
    }
}

// Describe a layer in all wrong ways, one after the other.
static void check_descriptions(struct search * s, struct sx_layer * layer) {
    const struct sx_layer right = *layer;
    const size_t size = right.rope.n_dims / 2 * sizeof(float);
    for (size_t i = 0; i < sizeof(WRONG) / sizeof(*WRONG); ++i) {
        *layer = right;
        if (right.freq_factors) {
            layer->freq_factors = malloc(size);
            memcpy(layer->freq_factors, right.freq_factors, size);
        }
        if (WRONG[i](layer)) {
            check_refused(s, layer, "wrong description", (int) i);
        }
        free(layer->freq_factors);
    }
    *layer = right;
}

// A model that rotates all heads but one.
static void check_heads(struct search * s, const struct sx_layer * layer) {
    const int64_t n = layer->rope.head_dim;
    for (int i = 0; i < s->there.n; ++i) {
        const struct sx_written * here = &s->here.written[i], * there = &s->there.written[i];
        if (there->layer != layer->index || !there->is_key) {
            continue;
        }
        float * head = malloc(n * sizeof(float));
        for (int64_t h = 0; h < there->n / n; ++h) {
            memcpy(head, there->row + h * n, n * sizeof(float));
            memcpy(there->row + h * n, here->row + h * n, n * sizeof(float));
            check_refused(s, layer, "head", (int) h);
            memcpy(there->row + h * n, head, n * sizeof(float));
        }
        free(head);
    }
}

// Layers that do not lie in their cache as one row for each token, and more devices than there is room for.
static void check_shapes(struct search * s, struct llama_context * ctx) {
    for (int l = 0; l < s->layers.n; ++l) {
        struct sx_layer * layer = &s->layers.layer[l];
        struct ggml_tensor * keys = layer->keys, wrong[4] = { *keys, *keys, *keys, *keys };
        const struct sx_rope rope = layer->rope;
        wrong[0].ne[1] -= 1;
        wrong[1].ne[2] = 2;
        wrong[2].ne[0] += 1;  // no whole head
        for (int i = 0; i < 4; ++i) {
            layer->keys = &wrong[i];
            layer->rope.n_hadamard = i == 3 ? keys->ne[0] + 1 : 0;  // no whole block
            if (i != 2 || (rope.n_dims > 0 && rope.head_dim > 1)) {
                CHECK(sx_layers_settle(&s->layers, ctx) == SX_ERR_MODEL && strstr(sx_last_error(), "has the shape"));
            }
        }
        layer->keys = keys;
        layer->rope = rope;
    }
    if (s->layers.n_devices == 1) {
        const struct sx_device device = s->layers.device[0];
        s->layers.device[0] = (struct sx_device) { 0 };
        s->layers.n_devices = SX_MAX_DEVICES;  // of no type
        CHECK(sx_layers_settle(&s->layers, ctx) == SX_ERR_DEVICE);
        s->layers.device[0] = device;
        s->layers.n_devices = 1;
    }
}

// Probes that say something else than what was computed.
static void check_probes(struct search * s, const struct sx_layer * layer) {
    struct sx_written * here = NULL, * there = NULL, * value = NULL;
    for (int i = 0; i < s->here.n; ++i) {
        here = s->here.written[i].layer == layer->index && s->here.written[i].is_key ? &s->here.written[i] : here;
    }
    for (int i = 0; i < s->there.n; ++i) {
        if (s->there.written[i].layer == layer->index) {
            *(s->there.written[i].is_key ? &there : &value) = &s->there.written[i];
        }
    }
    CHECK(here && there && here->n == there->n);
    // No key of the cache's width.
    here->n--;
    CHECK(verify(s) == SX_ERR_MODEL && strstr(sx_last_error(), "does not write its key whenever"));
    here->n++;
    there->n--;
    CHECK(verify(s) == SX_ERR_MODEL && strstr(sx_last_error(), "does not write its key whenever"));
    there->n++;
    // A layer whose input differs that much says nothing about half of its key; a key of nothing turns into itself.
    const size_t size = here->n * sizeof(float);
    float * rows = malloc(2 * size);
    CHECK(rows);
    memcpy(rows, here->row, size);
    memcpy(rows + here->n, there->row, size);
    if (value) {
        const float first = value->row[0];
        value->row[0] += 1e6f;
        CHECK(verify(s) == SX_OK);
        for (int64_t i = 0; i < here->n; ++i) {
            there->row[i] = -2.0f * rows[i];
        }
        check_refused(s, layer, "differing input", 0);
        value->row[0] = first;
    }
    memset(here->row, 0, size);
    memset(there->row, 0, size);
    CHECK(verify(s) == SX_OK);
    memcpy(here->row, rows, size);
    memcpy(there->row, rows + here->n, size);
    free(rows);
    // Cells that are too few to be tried.
    layer->keys->ne[1] = 100;
    CHECK(verify(s) == SX_ERR_MODEL && strstr(sx_last_error(), "the context is too small to be tried: 100 tokens"));
    layer->keys->ne[1] = N_CTX;
}

static void check_type(struct llama_model * model, int type) {
    struct search s = { .probe = &s.here };
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = N_CTX;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = (enum ggml_type) type;
    params.type_v = ggml_is_quantized(params.type_k) ? GGML_TYPE_F16 : params.type_k;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.cb_eval = collect;
    params.cb_eval_user_data = &s;
    struct llama_context * ctx = llama_init_from_model(model, params);
    CHECK(ctx);
    CHECK(sx_decode_probe(ctx, 0) == SX_OK);
    CHECK(sx_layers_settle(&s.layers, ctx) == SX_OK);
    check_shapes(&s, ctx);
    CHECK(sx_layers_settle(&s.layers, ctx) == SX_OK);  // again, and nothing new
    llama_memory_clear(llama_get_memory(ctx), true);
    s.probe = &s.there;
    CHECK(sx_decode_probe(ctx, SX_PROBE_POSITION) == SX_OK);

    CHECK(verify(&s) == SX_OK);
    for (int l = s.layers.n - 1; l >= 0; --l) {
        struct sx_layer * layer = &s.layers.layer[l];
        if (layer->rope.n_dims > 0) {
            check_descriptions(&s, layer);
            check_heads(&s, layer);
            check_probes(&s, layer);
            is_lazy = true;
            CHECK(verify(&s) == (type == GGML_TYPE_F32 ? SX_OK : SX_ERR_DEVICE));
            is_lazy = false;
            break;
        }
    }
    CHECK(verify(&s) == SX_OK);
    sx_probe_free(&s.here);
    CHECK(verify(&s) == (s.layers.n ? SX_ERR_MODEL : SX_OK));
    sx_probe_free(&s.there);
    llama_free(ctx);
    sx_layers_free(&s.layers);
}

int main(int argc, char ** argv) {
    CHECK(argc > 2);
    sx_log_silence();
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    CHECK(model);
    for (int i = 2; i < argc; ++i) {
        check_type(model, atoi(argv[i]));
    }
    llama_model_free(model);
    llama_backend_free();
    puts("ok");
    return 0;
}
