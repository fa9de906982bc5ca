// Whatever asks for memory or for a device's work is refused once, the n-th request for every n. Each time an error is
// reported, nothing leaks (the address sanitizer looks), and what is read after another try has the logits that it has
// without any trouble, bit for bit.
// usage: test_failures MODEL.gguf K_TYPE
#include <string.h>

#include "check.h"

enum { N_CTX = 512, N_STEP = 16 };

static int n_until_refused = 0;  // 0 = never

bool is_refused(void) {
    return n_until_refused > 0 && --n_until_refused == 0;
}

static struct llama_model * model;
static enum ggml_type type;

static struct llama_context * new_context(sx_engine * e) {
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = N_CTX;
    params.n_batch = params.n_ubatch = N_STEP;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = type;
    params.cb_eval = sx_engine_eval_callback;
    params.cb_eval_user_data = e;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context * ctx = llama_init_from_model(model, params);
    CHECK(ctx);
    return ctx;
}

static void check_told(int status) {
    CHECK(status < 0 && sx_last_error()[0] != '\0');
}

// Move the keys for the next step; after a failure, what the header says of its status.
static bool moved(sx_engine * e, struct llama_context * ctx, const struct sx_params * p, int32_t n_step) {
    int32_t positions[N_CTX], before[N_CTX], after[N_CTX];
    const int32_t at = sx_engine_n_tokens(e);
    CHECK(sx_schedule_positions(p, at, at + n_step, positions) == SX_OK);
    sx_engine_get_key_positions(e, before);
    const int32_t status = sx_engine_set_key_positions(e, positions, at);
    if (status == SX_OK) {
        return true;
    }
    check_told(status);
    sx_engine_get_key_positions(e, after);
    CHECK(sx_engine_n_tokens(e) == at && memcmp(before, after, at * sizeof(int32_t)) == 0);
    if (status != SX_ERR_MEMORY) {  // the cache may be anything
        llama_memory_clear(llama_get_memory(ctx), true);
        sx_engine_truncate(e, 0);
    }
    return false;
}

static bool decoded(sx_engine * e, int32_t n_step) {
    struct llama_batch batch = llama_batch_init(N_STEP, 0, 1);
    const int32_t at = sx_engine_n_tokens(e);
    batch.n_tokens = n_step;
    for (int32_t j = 0; j < n_step; ++j) {
        batch.token[j]     = 1 + (at + j) * 7 % 250;
        batch.pos[j]       = at + j;
        batch.n_seq_id[j]  = 1;
        batch.seq_id[j][0] = 0;
        batch.logits[j]    = j == n_step - 1;
    }
    const int32_t status = sx_engine_decode(e, batch);
    llama_batch_free(batch);
    if (status != SX_OK) {
        check_told(status);
        CHECK(sx_engine_n_tokens(e) == at || sx_engine_n_tokens(e) == 0);
    }
    return status == SX_OK;
}

static void read_text(sx_engine * e, struct llama_context * ctx, const struct sx_params * p, int32_t n) {
    while (sx_engine_n_tokens(e) < n) {
        const int32_t left = n - sx_engine_n_tokens(e), n_step = left < N_STEP ? left : N_STEP;
        if (moved(e, ctx, p, n_step)) {
            decoded(e, n_step);
        }
    }
}

// An engine that is attached, whatever it takes.
static sx_engine * attached(struct llama_context ** ctx) {
    for (;;) {
        sx_engine * e = sx_engine_init(N_CTX);
        if (!e) {
            check_told(SX_ERR_MEMORY);
            continue;
        }
        *ctx = new_context(e);
        const int32_t status = sx_engine_attach(e, *ctx);
        if (status == SX_OK) {
            return e;
        }
        check_told(status);
        CHECK(sx_engine_set_key_positions(e, NULL, 0) == SX_ERR_ARGUMENT);
        llama_free(*ctx);
        sx_engine_free(e);
    }
}

// Read a text of three trained contexts, and return the logits of its last token.
static void live(float * logits) {
    const int32_t L = llama_model_n_ctx_train(model);
    const struct sx_params p = {
        .schedule = SX_SCHEDULE_SELFEXTEND, .n_ctx_train = L, .group_size = L, .neighbor_window = L / 4,
        .max_distance = L, .block_size = L / 8,
    };
    struct llama_context * ctx = NULL;
    sx_engine * e = attached(&ctx);
    read_text(e, ctx, &p, 2 * L);
    memcpy(logits, llama_get_logits_ith(ctx, -1), llama_vocab_n_tokens(llama_model_get_vocab(model)) * sizeof(float));
    llama_free(ctx);
    sx_engine_free(e);
}

int main(int argc, char ** argv) {
    CHECK(argc == 3);
    sx_log_silence();
    llama_backend_init();
    model = llama_model_load_from_file(argv[1], llama_model_default_params());
    CHECK(model);
    type = (enum ggml_type) atoi(argv[2]);
    const int32_t n = llama_vocab_n_tokens(llama_model_get_vocab(model));
    float * wanted = malloc(n * sizeof(float)), * got = malloc(n * sizeof(float));
    CHECK(wanted && got);
    live(wanted);
    int n_refused = 0;
    for (;; ++n_refused) {
        n_until_refused = n_refused + 1;
        live(got);
        CHECK(memcmp(wanted, got, n * sizeof(float)) == 0);
        if (n_until_refused > 0) {  // there were fewer requests
            break;
        }
    }
    fprintf(stderr, "%d requests refused\n", n_refused);
    CHECK(n_refused > 50);
    n_until_refused = 0;
    free(got);
    free(wanted);
    llama_model_free(model);
    llama_backend_free();
    puts("ok");
    return 0;
}
