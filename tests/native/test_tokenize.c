// Texts on which llama_tokenize ends the process. usage: test_tokenize MODEL.gguf, its tokens being bytes
#include <string.h>

#include "check.h"

enum { N_TEXT = 40000, N_STACK = 64 << 20 };

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    struct llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    struct llama_model * model = llama_model_load_from_file(argv[1], params);
    CHECK(model);
    const struct llama_vocab * vocab = llama_model_get_vocab(model);

    char * text      = malloc(N_TEXT);
    int32_t * tokens = malloc(N_TEXT * sizeof(int32_t));
    int32_t n        = 0;
    memset(text, 'A', N_TEXT);
    CHECK(sx_longest_match(text, N_TEXT) == N_TEXT);
    CHECK(sx_tokenize(vocab, text, N_TEXT, false, true, N_STACK, tokens, N_TEXT, &n) == SX_OK);
    CHECK(n == N_TEXT && tokens[0] == 'A' && tokens[n - 1] == 'A');

    // Too little room: how much there should be.
    CHECK(sx_tokenize(vocab, "abc", 3, false, true, 0, tokens, 2, &n) == SX_OK);
    CHECK(n == -3);
    CHECK(sx_tokenize(vocab, "abc", 3, false, true, 0, tokens, 3, &n) == SX_OK);
    CHECK(n == 3 && tokens[2] == 'c');

    // An exception of llama.cpp, on this thread and on another.
    for (int64_t n_stack = 0; n_stack <= N_STACK; n_stack += N_STACK) {
        n = 7;
        CHECK(sx_tokenize(vocab, "\xf7\xbf\xbf\xbf", 4, false, true, n_stack, tokens, N_TEXT, &n) == SX_ERR_TEXT);
        CHECK(n == 7 && strstr(sx_last_error(), "invalid codepoint"));
    }
    CHECK(sx_tokenize(vocab, "abc", 3, false, true, INT64_MAX / 2, tokens, 3, &n) == SX_ERR_MEMORY);

    CHECK(sx_special_tokens(vocab, NULL, 0) == 1);
    CHECK(sx_special_tokens(vocab, tokens, 1) == 1 && tokens[0] == 0);

    free(tokens);
    free(text);
    llama_model_free(model);
    puts("ok");
    return 0;
}
