// llama_tokenize behind a barrier: llama.cpp's tokenizer recurses, throws and asserts, each of which would end the
// process of whoever asked for the tokens of a text. C++, because only C++ can catch what C++ throws.
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>

#include "aborts.h"
#include "error.h"
#include "selfextend.h"

namespace {

// ---- one call ----------------------------------------------------------------------------------------------------

struct call {
    const llama_vocab * vocab;
    const char * text;
    int32_t n_text;
    bool add_special;
    bool parse_special;
    int32_t * tokens;
    int32_t n_max;

    int32_t status;
    int32_t n_tokens;
    char message[256];

    void run() noexcept {
        try {
            const sx::abort_watch watch;
            n_tokens = llama_tokenize(vocab, text, n_text, tokens, n_max, add_special, parse_special);
            status   = n_tokens == INT32_MIN ? fail(SX_ERR_TEXT, "it has 2^31 tokens or more") : int32_t(SX_OK);
        } catch (const std::bad_alloc &) {
            status = fail(SX_ERR_MEMORY, "no memory is left");
        } catch (const std::exception & error) {
            status = fail(SX_ERR_TEXT, error.what());
        } catch (...) {
            status = fail(SX_ERR_TEXT, "an unknown exception");
        }
    }

  private:
    int32_t fail(int32_t code, const char * reason) noexcept {
        snprintf(message, sizeof(message), "%s", reason);
        return code;
    }
};

void * run_call(void * data) {
    static_cast<call *>(data)->run();
    return nullptr;
}

bool is_space(unsigned char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

bool is_letter(unsigned char c) {
    return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c >= 0x80;
}

}  // namespace

/*
 * llama.cpp's pre-tokenizers are regular expressions, matched by recursion for each character. What they match is
 *   - text without white space, with one white space before it and line breaks and slashes behind it, or
 *   - white space, or
 *   - letters with spaces between (exaone-moe).
 * So a match lies in a run of letters and spaces, or in two neighbouring stretches [^ws]* [ws][ws /]*.
 * Bytes from 0x80 on count as letters: that makes runs longer, never shorter.
 */
int64_t sx_longest_match(const char * text, int64_t n_text) {
    int64_t longest = 0, before = 0, stretch = 0, words = 0;
    bool is_tail = false;
    for (int64_t i = 0; i < n_text; i++) {
        const unsigned char c = text[i];
        if (is_tail && !is_space(c) && c != '/') {
            before  = stretch;
            stretch = 0;
            is_tail = false;
        }
        stretch++;
        is_tail = is_tail || is_space(c);
        words   = is_letter(c) || c == ' ' ? words + 1 : 0;
        longest = std::max({ longest, before + stretch, words });
    }
    return longest;
}

int32_t sx_tokenize(const struct llama_vocab * vocab, const char * text, int32_t n_text, bool add_special,
                    bool parse_special, int64_t n_stack, int32_t * tokens, int32_t n_max, int32_t * n_tokens) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return sx_fail(SX_ERR_TEXT, "the model has no vocabulary");
    }
    call call = {};
    call.vocab         = vocab;
    call.text          = text;
    call.n_text        = n_text;
    call.add_special   = add_special;
    call.parse_special = parse_special;
    call.tokens        = tokens;
    call.n_max         = n_max;
    if (n_stack == 0) {
        call.run();
    } else {
        pthread_attr_t attributes;
        pthread_t thread;
        pthread_attr_init(&attributes);
        const bool started = pthread_attr_setstacksize(&attributes, size_t(n_stack)) == 0 &&
                             pthread_create(&thread, &attributes, run_call, &call) == 0;
        pthread_attr_destroy(&attributes);
        if (!started) {
            return sx_fail(SX_ERR_MEMORY, "no stack of %lld MiB can be had", (long long) (n_stack >> 20));
        }
        pthread_join(thread, nullptr);
    }
    if (call.status != SX_OK) {
        return sx_fail(call.status, "llama.cpp's tokenizer failed on the text: %s", call.message);
    }
    *n_tokens = call.n_tokens;
    return SX_OK;
}

int32_t sx_special_tokens(const struct llama_vocab * vocab, int32_t * tokens, int32_t n_max) {
    const int special = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN | LLAMA_TOKEN_ATTR_USER_DEFINED;
    int32_t n = 0;
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        return 0;
    }
    for (int32_t token = 0; token < llama_vocab_n_tokens(vocab); token++) {
        if (llama_vocab_get_attr(vocab, token) & special) {
            if (n < n_max) {
                tokens[n] = token;
            }
            n++;
        }
    }
    return n;
}
