// Engines of one model, each on a thread of its own, and what threads share: the log, the aborts that are thrown, the
// last error. For the thread sanitizer.
// usage: test_threads MODEL.gguf
#include <pthread.h>
#include <string.h>

#include "check.h"

enum { N_CTX = 256, N_STEP = 16, N_THREADS = 4 };

static struct llama_model * model;

static void * live(void * number) {
    const int32_t L = llama_model_n_ctx_train(model);
    const struct sx_params p = {
        .schedule = SX_SCHEDULE_SELFEXTEND, .n_ctx_train = L, .group_size = L, .neighbor_window = L / 4,
        .max_distance = L, .block_size = L / 8,
    };
    char message[64];
    snprintf(message, sizeof(message), "n_ctx must be positive, not %d", -*(int *) number);
    sx_engine * e = sx_engine_init(N_CTX);
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = N_CTX;
    params.n_batch = params.n_ubatch = N_STEP;
    params.n_threads = params.n_threads_batch = 1;
    params.cb_eval = sx_engine_eval_callback;
    params.cb_eval_user_data = e;
    // What llama.cpp says of a file that is not there is told to the thread that asked for it.
    sx_log_note_errors(true);
    sx_aborts_throw(true);
    CHECK(llama_model_load_from_file(message, llama_model_default_params()) == NULL);
    CHECK(strstr(sx_last_error(), message));
    struct llama_context * ctx = llama_init_from_model(model, params);
    sx_aborts_throw(false);
    sx_log_note_errors(false);
    CHECK(ctx && sx_engine_init(-*(int *) number) == NULL && sx_engine_attach(e, ctx) == SX_OK && sx_interrupt_watch(ctx) == SX_OK);
    llama_token tokens[N_STEP];
    int32_t positions[N_CTX], n_tokens = 0;
    while (sx_engine_n_tokens(e) < 2 * L) {
        const int32_t at = sx_engine_n_tokens(e);
        CHECK(sx_tokenize(llama_model_get_vocab(model), "in those days", 13, false, false, 0, tokens, N_STEP, &n_tokens) == SX_OK);
        CHECK(sx_schedule_positions(&p, at, at + n_tokens, positions) == SX_OK);
        CHECK(sx_engine_set_key_positions(e, positions, at) == SX_OK);
        CHECK(sx_engine_decode(e, llama_batch_get_one(tokens, n_tokens)) == SX_OK);
    }
    llama_free(ctx);
    sx_engine_free(e);
    CHECK(strcmp(sx_last_error(), message) == 0);
    return NULL;
}

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    sx_log_silence();
    llama_backend_init();
    model = llama_model_load_from_file(argv[1], llama_model_default_params());
    CHECK(model);
    pthread_t threads[N_THREADS];
    int numbers[N_THREADS];
    for (int i = 0; i < N_THREADS; ++i) {
        numbers[i] = i;
        CHECK(pthread_create(&threads[i], NULL, live, &numbers[i]) == 0);
    }
    for (int i = 0; i < N_THREADS; ++i) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    llama_model_free(model);
    llama_backend_free();
    puts("ok");
    return 0;
}
