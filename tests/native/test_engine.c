// An engine's whole life on a real model: attach, read beyond the trained context, roll back, refuse, free.
// usage: test_engine MODEL.gguf K_TYPE, with K_TYPE a number of enum ggml_type
#include <string.h>

#include "check.h"

enum { N_CTX = 1024, N_STEP = 16 };

static void read_tokens(sx_engine * e, const struct sx_params * p, int32_t n) {
    int32_t positions[N_CTX];
    struct llama_batch batch = llama_batch_init(N_STEP, 0, 1);
    for (int32_t i = 0; i < n; i += batch.n_tokens) {
        const int32_t at = sx_engine_n_tokens(e);
        batch.n_tokens = n - i < N_STEP ? n - i : N_STEP;
        for (int32_t j = 0; j < batch.n_tokens; ++j) {
            batch.token[j]     = 1 + (at + j) * 7 % 250;
            batch.pos[j]       = at + j;
            batch.n_seq_id[j]  = 1;
            batch.seq_id[j][0] = 0;
            batch.logits[j]    = 0;
        }
        CHECK(sx_schedule_positions(p, at, at + batch.n_tokens, positions) == SX_OK);
        CHECK(sx_engine_set_key_positions(e, positions, at) == SX_OK);
        CHECK(sx_engine_decode(e, batch) == SX_OK);
    }
    llama_batch_free(batch);
}

int main(int argc, char ** argv) {
    CHECK(argc == 3);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    CHECK(model);

    CHECK(sx_engine_init(0) == NULL);
    sx_engine_free(NULL);
    sx_engine * e = sx_engine_init(N_CTX);
    CHECK(e);

    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = N_CTX;
    params.n_batch = params.n_ubatch = N_STEP;
    params.type_k = (enum ggml_type) atoi(argv[2]);
    params.cb_eval = sx_engine_eval_callback;
    params.cb_eval_user_data = e;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context * ctx = llama_init_from_model(model, params);
    CHECK(ctx);

    // Before attach nothing works and nothing breaks.
    struct llama_batch none = { 0 };
    CHECK(sx_engine_decode(e, none) == SX_ERR_ARGUMENT);
    CHECK(sx_engine_set_key_positions(e, NULL, 0) == SX_ERR_ARGUMENT);
    CHECK(sx_engine_attach(e, ctx) == SX_OK);
    CHECK(sx_engine_attach(e, ctx) == SX_ERR_ARGUMENT);
    CHECK(sx_engine_n_layers(e) == llama_model_n_layer(model));
    CHECK(sx_interrupt_watch(ctx) == SX_OK);

    const int32_t L = llama_model_n_ctx_train(model);
    const struct sx_params p = {
        .schedule = SX_SCHEDULE_SELFEXTEND, .n_ctx_train = L, .group_size = L, .neighbor_window = L / 4,
        .max_distance = L, .block_size = L / 8,
    };
    read_tokens(e, &p, 10 * L);
    CHECK(sx_engine_n_tokens(e) == 10 * L);
    CHECK(sx_engine_stats(e).n_rewrites > 0);

    // Roll back into the grouped part and read on.
    CHECK(llama_memory_seq_rm(llama_get_memory(ctx), 0, 3 * L, -1));
    sx_engine_truncate(e, 3 * L);
    sx_engine_truncate(e, 5 * L);  // more than it holds: no effect
    CHECK(sx_engine_n_tokens(e) == 3 * L);
    read_tokens(e, &p, 2 * L);

    // Refused, and nothing changed.
    int32_t before[N_CTX], after[N_CTX];
    sx_engine_get_key_positions(e, before);
    CHECK(sx_engine_set_key_positions(e, before, 3) == SX_ERR_ARGUMENT);
    memcpy(after, before, sizeof(after));
    after[1] = N_CTX + 1;
    CHECK(sx_engine_set_key_positions(e, after, 5 * L) == SX_ERR_ARGUMENT);
    after[1] = -1;
    CHECK(sx_engine_adopt_key_positions(e, after, 5 * L) == SX_ERR_ARGUMENT);
    CHECK(sx_engine_adopt_key_positions(e, after, N_CTX + 1) == SX_ERR_ARGUMENT);
    llama_token token = 5;
    llama_pos position = 17;
    struct llama_batch elsewhere = llama_batch_get_one(&token, 1);
    elsewhere.pos = &position;
    CHECK(sx_engine_decode(e, elsewhere) == SX_ERR_ARGUMENT);
    sx_engine_get_key_positions(e, after);
    CHECK(memcmp(before, after, 5 * L * sizeof(int32_t)) == 0);

    // A hole in the cache: llama.cpp puts the next key there, in a cell that is not its token index.
    llama_memory_t memory = llama_get_memory(ctx);
    llama_memory_seq_rm(memory, 0, 10, 20);
    CHECK(sx_engine_decode(e, llama_batch_get_one(&token, 1)) == SX_ERR_CACHE);
    CHECK(sx_engine_n_tokens(e) == 0 && llama_memory_seq_pos_max(memory, 0) == -1);
    read_tokens(e, &p, 40);

    // Tokens that only one of the two forgot.
    sx_engine_truncate(e, 30);
    CHECK(sx_engine_decode(e, llama_batch_get_one(&token, 1)) == SX_ERR_CACHE);
    CHECK(sx_engine_n_tokens(e) == 0 && llama_memory_seq_pos_max(memory, 0) == -1);
    read_tokens(e, &p, 3 * L);

    llama_free(ctx);
    sx_engine_free(e);
    llama_model_free(model);
    llama_backend_free();
    puts("ok");
    return 0;
}
