// The verification at load: layers described rightly pass, layers described wrongly are refused.
// usage: test_layers MODEL.gguf K_TYPE (see test_engine.c)
#include <string.h>

#include "check.h"
#include "error.h"
#include "verify.h"

enum { N_CTX = 512 };

struct search {
    struct sx_layers layers;
    bool finding;
};

static bool collect(struct ggml_tensor * node, bool ask, void * user_data) {
    struct search * search = user_data;
    CHECK(!ask || !search->finding || sx_layers_look_at(&search->layers, node) == SX_OK);
    return false;
}

static void rightly(struct sx_rope * rope) {
    (void) rope;
}

static void wrong_base(struct sx_rope * rope) {
    rope->freq_base *= 2.0f;
}

static void wrong_pairs(struct sx_rope * rope) {
    rope->mode = rope->mode == GGML_ROPE_TYPE_NEOX ? GGML_ROPE_TYPE_NORMAL : GGML_ROPE_TYPE_NEOX;
}

static void half_of_the_head(struct sx_rope * rope) {
    rope->n_dims /= 2;
}

static void no_rope(struct sx_rope * rope) {
    rope->n_dims = 0;
}

// Describe one layer of a new context by `change`, and let the library verify it.
static int settle(struct llama_model * model, int type, void (* change)(struct sx_rope *)) {
    struct search search = { .finding = true };
    struct sx_layers * layers = &search.layers;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = N_CTX;
    params.type_k = (enum ggml_type) type;
    params.cb_eval = collect;
    params.cb_eval_user_data = &search;
    struct llama_context * ctx = llama_init_from_model(model, params);
    CHECK(ctx);
    CHECK(sx_decode_probe(ctx, 0) == SX_OK);
    search.finding = false;
    CHECK(layers->n == llama_model_n_layer(model));
    change(&layers->layer[1].rope);
    int status = sx_layers_settle(layers, ctx);
    status = status ? status : sx_layers_verify(layers, ctx);
    llama_free(ctx);
    sx_layers_free(layers);
    return status;
}

int main(int argc, char ** argv) {
    CHECK(argc == 3);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    CHECK(model);
    const int type = atoi(argv[2]);
    CHECK(settle(model, type, rightly) == SX_OK);
    CHECK(settle(model, type, wrong_base) == SX_ERR_MODEL);
    CHECK(settle(model, type, wrong_pairs) == SX_ERR_MODEL);
    CHECK(settle(model, type, half_of_the_head) == SX_ERR_MODEL);
    CHECK(settle(model, type, no_rope) == SX_ERR_MODEL);
    CHECK(strstr(sx_last_error(), "layer 1 does not hold its keys as its compute graph says"));
    llama_model_free(model);
    llama_backend_free();
    puts("ok");
    return 0;
}
