/*
 * Self-Extend (arXiv 2401.01325) for llama.cpp: read texts longer than the trained context of a RoPE model
 * by giving the cached keys outside a neighbor window shared, "grouped" key positions.
 *
 * Words used throughout
 *   token index   0-based place of a token in the text; llama.cpp's own position of it and of its cache cell
 *   key position  P(k), the position the cached key of token k stands for; a query always stands at its
 *                 token index, so it sees key k at the distance q - P(k)
 *   frame         RoPE scores depend on differences only, so the angles really stored are those of
 *                 P(k) - P(0), and new queries and keys are rotated to (token index) - P(0). Keys of one
 *                 group then keep their stored angle while the window moves on: each key is rewritten a
 *                 few times in its life, not once per step.
 *
 * Thread safety
 *   The schedule functions are pure. An engine belongs to one llama_context and must be used by one thread
 *   at a time, like the context. sx_last_error() is per thread.
 *
 * Usage
 *   sx_engine * engine = sx_engine_init(n_ctx);
 *   cparams.cb_eval           = sx_engine_eval_callback;
 *   cparams.cb_eval_user_data = engine;
 *   struct llama_context * ctx = llama_init_from_model(model, cparams);
 *   if (sx_engine_attach(engine, ctx) != SX_OK) { puts(sx_last_error()); ... }
 *
 *   // for the n_new tokens to come after n_cached, until none is left:
 *   sx_schedule_step(&params, n_cached, n_new, &n_step);               // n_total = n_cached + n_step
 *   sx_schedule_positions(&params, n_cached, n_total, positions);      // plan: integers only
 *   sx_engine_set_key_positions(engine, positions, n_cached);          // apply: rotates the changed keys
 *   sx_engine_decode(engine, batch);                                   // run
 *
 *   // roll back to n tokens: first llama_memory_seq_rm(memory, 0, n, -1), then
 *   sx_engine_truncate(engine, n);
 *
 *   llama_free(ctx);          // the context calls into the engine, so it goes first
 *   sx_engine_free(engine);
 */
#ifndef SELFEXTEND_H
#define SELFEXTEND_H

#include <stdbool.h>
#include <stdint.h>

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SX_API __attribute__((visibility("default")))

enum sx_status {
    SX_OK           =  0,
    SX_ERR_ARGUMENT = -1,  // a parameter is out of range
    SX_ERR_SCHEDULE = -2,  // the schedule cannot keep its distances for this step
    SX_ERR_MODEL    = -3,  // the model or context cannot be extended
    SX_ERR_DECODE   = -4,  // llama_decode failed
    SX_ERR_CACHE    = -5,  // cache and bookkeeping disagree
    SX_ERR_MEMORY   = -6,  // out of memory on the host or on a device
    SX_ERR_DEVICE   = -7,  // a device could not run the rotation
    SX_ERR_ABORTED  = -8,  // the abort callback of the context stopped llama_decode
    SX_ERR_TEXT     = -9,  // llama.cpp's tokenizer fails on the text
};

enum sx_schedule {
    SX_SCHEDULE_SELFEXTEND   = 0,  // plain up to the trained context, then the largest window that fits
    SX_SCHEDULE_PAPER        = 1,  // always grouped beyond a fixed neighbor window
    // Plain up to the trained context, and then:
    SX_SCHEDULE_ADAGROPE     = 2,  // groups that grow with the distance and with the text (ACL 2025, long paper 28)
    SX_SCHEDULE_REROPE       = 3,  // one position for all beyond a fixed window (https://kexue.fm/archives/9708)
    SX_SCHEDULE_LEAKY_REROPE = 4,  // distances beyond a fixed window grow with a fractional slope (same source)
    SX_SCHEDULE_RESTART      = 5,  // distances beyond a fixed window begin again at half of it (arXiv 2607.07740)
    SX_SCHEDULE_DCA          = 6,  // chunks beyond a fixed window lie on top of each other (arXiv 2402.17463)
};

// What a schedule needs to know; all lengths in tokens.
struct sx_params {
    int32_t schedule;         // enum sx_schedule
    int32_t n_ctx_train;      // trained context L
    int32_t group_size;       // G >= 1: tokens that share one key position (selfextend, paper)
    int32_t neighbor_window;  // W >= 1: latest tokens that always keep their exact distances
    int32_t max_distance;     // D: distances stay below it
    int32_t block_size;       // the boundary between grouped and exact keys moves in such steps
    int32_t n_ctx;            // longest text (leaky-rerope)
    int32_t n_batch;          // a step of so many tokens works wherever it starts (leaky-rerope, restart)
};

struct sx_stats {
    int64_t n_rewrites;  // steps that changed the angle of at least one key
    int64_t n_rows;      // cache rows (tokens) rotated, summed over those steps; each in every layer
    int64_t t_us;        // time spent rotating, microseconds
};

typedef struct sx_engine sx_engine;

// Message of the last failed call on this thread ("" if none); valid until the next failing call.
SX_API const char * sx_last_error(void);

// Version of llama-cpp-python whose headers this library was compiled against, e.g. "0.3.36".
SX_API const char * sx_built_against(void);

/*
 * Stage of a step that decodes tokens [n_cached, n_total): while the stage stays the same, so do the positions of all
 * cached keys, P(k) = k for those decoded meanwhile. Stage 0 is P(k) = k for all. Numbers of different schedules or
 * parameters have nothing to do with each other.
 *   SX_OK            *stage is set, >= 0
 *   SX_ERR_ARGUMENT  params or counts out of range; *stage untouched
 *   SX_ERR_SCHEDULE  no key positions keep all distances below max_distance and the window at least neighbor_window
 *                    for a step of this size; *stage untouched. sx_last_error() says which change would work.
 */
SX_API int32_t sx_schedule_stage(
        const struct sx_params * params, int32_t n_cached, int32_t n_total, int32_t * stage);

/*
 * Key positions P(0..n_cached-1) for the same step, a function of its stage: P(k) >= k, and the latest neighbor_window
 * keys have P(k) = k. They grow with k, by 0 or 1 from key to key, except that restart goes back once, where the window
 * begins, and dca at the beginning of each chunk.
 * positions: (n_cached) int32, written only on SX_OK. Return codes as sx_schedule_stage.
 */
SX_API int32_t sx_schedule_positions(
        const struct sx_params * params, int32_t n_cached, int32_t n_total, int32_t * positions);

/*
 * How many of n_new tokens to decode in the next step after n_cached: up to where the stage changes, so that every
 * token is computed under the stage its own index asks for. Logits then do not depend on how a text is cut.
 *   SX_OK  *n_step is set, 1 <= *n_step <= n_new; decoding fewer is fine
 *   otherwise as sx_schedule_stage; *n_step untouched
 */
SX_API int32_t sx_schedule_step(const struct sx_params * params, int32_t n_cached, int32_t n_new, int32_t * n_step);

/*
 * Whether the header of a model's file rules out that it is extended; the model may be loaded with vocab_only.
 *   SX_OK         it does not; sx_engine_attach looks closer
 *   SX_ERR_MODEL  sx_last_error() says why it cannot be extended
 */
SX_API int32_t sx_model_check(const struct llama_model * model);

// A new engine for a context of at most n_ctx tokens; NULL and sx_last_error() on failure.
SX_API sx_engine * sx_engine_init(int32_t n_ctx);

// Free an engine (NULL is fine). Its llama_context must have been freed or must never decode again.
SX_API void sx_engine_free(sx_engine * engine);

// For llama_context_params.cb_eval, with the engine as cb_eval_user_data. Never asks to see a result.
SX_API bool sx_engine_eval_callback(struct ggml_tensor * node, bool ask, void * engine);

/*
 * Find every layer's keys and RoPE by decoding a token, verify them by decoding another one and by rotating keys of the
 * first 192 cells, then clear the memory of ctx.
 *   SX_OK          the engine holds 0 tokens and is ready
 *   SX_ERR_MODEL   sx_last_error() says why it cannot be extended; ctx stays usable for other purposes
 *   SX_ERR_DECODE, SX_ERR_MEMORY, SX_ERR_DEVICE   likewise
 */
SX_API int32_t sx_engine_attach(sx_engine * engine, struct llama_context * ctx);

// Number of layers whose keys are rewritten (not those without RoPE or with sliding attention); 0 before attach.
SX_API int32_t sx_engine_n_layers(const sx_engine * engine);

// Whether angles are stored in a frame (see above), so that a key is rewritten a few times however long the text
// becomes. Without one, in models with sliding attention, every key is rewritten whenever the boundary moves.
SX_API bool sx_engine_has_frame(const sx_engine * engine);

// Name of the i-th device that holds rewritten keys ("CPU", "Metal", "RPC0[...]"); NULL from the last one on.
SX_API const char * sx_engine_device_name(const sx_engine * engine, int32_t i);

// Number of cached tokens.
SX_API int32_t sx_engine_n_tokens(const sx_engine * engine);

// Copy P(0..n_tokens-1) to positions, (n_tokens) int32.
SX_API void sx_engine_get_key_positions(const sx_engine * engine, int32_t * positions);

/*
 * Rotate cached keys from the positions they hold to `positions`, (n) int32 with n = sx_engine_n_tokens().
 *   SX_OK            all keys stand for the new positions
 *   SX_ERR_ARGUMENT  wrong n, or a position outside [0, n_ctx]: nothing changed
 *   SX_ERR_MEMORY    nothing changed
 *   SX_ERR_DEVICE    some layers may be rotated and others not: the cache must be cleared
 */
SX_API int32_t sx_engine_set_key_positions(sx_engine * engine, const int32_t * positions, int32_t n);

/*
 * Declare, without rotating, that the cache holds n tokens whose keys stand for `positions` (NULL: P(k) = k),
 * as after llama_state_set_data. SX_ERR_ARGUMENT: wrong n or position; nothing changed.
 */
SX_API int32_t sx_engine_adopt_key_positions(sx_engine * engine, const int32_t * positions, int32_t n);

/*
 * llama_decode for an engine: one sequence, positions continuing the cache. New keys get P(k) = k.
 *   SX_OK            the cache holds the batch, its logits are ready
 *   SX_ERR_ARGUMENT  not such a batch; nothing changed
 *   SX_ERR_DECODE    llama_decode failed; the cache is back at the tokens it held before
 *   SX_ERR_ABORTED   likewise, because an abort callback asked for it
 *   SX_ERR_CACHE     a cell was not where its token index says, or the graph changed its shape:
 *                    the cache is cleared (0 tokens) because its contents cannot be trusted
 */
SX_API int32_t sx_engine_decode(sx_engine * engine, struct llama_batch batch);

// Forget the tokens from n on (n >= the number held: no effect). The caller removes them from llama's memory.
SX_API void sx_engine_truncate(sx_engine * engine, int32_t n);

SX_API struct sx_stats sx_engine_stats(const sx_engine * engine);

/*
 * Longest part of a text, in bytes, that the regular expression of a pre-tokenizer may match at once, or more: an upper
 * bound for all pre-tokenizers. llama.cpp recurses for each character of a match.
 */
SX_API int64_t sx_longest_match(const char * text, int64_t n_text);

/*
 * llama_tokenize, which ends the process on some texts: it recurses, throws and asserts.
 * n_stack: 0 = on this thread; else on a thread with so many bytes of stack, of which those are used that are needed.
 * tokens: (n_max) int32, written only on SX_OK and if they have room. Any number of threads may call it at once.
 *   SX_OK          *n_tokens is their number, or minus the number that there would be if n_max is too small
 *   SX_ERR_TEXT    the tokenizer failed on the text, or the model has no vocabulary
 *   SX_ERR_MEMORY  no memory for the tokens or the stack
 */
SX_API int32_t sx_tokenize(
        const struct llama_vocab * vocab, const char * text, int32_t n_text, bool add_special, bool parse_special,
        int64_t n_stack, int32_t * tokens, int32_t n_max, int32_t * n_tokens);

/*
 * From on to off, on the thread that calls, what llama.cpp asserts while it loads a model or makes a context is an error
 * that it logs, and NULL is returned, instead of the end of the process.
 */
SX_API void sx_aborts_throw(bool on);

// Number of tokens with a text of their own beside the vocabulary of words (control, unknown, user-defined), of which
// the first n_max are written to tokens, in ascending order.
SX_API int32_t sx_special_tokens(const struct llama_vocab * vocab, int32_t * tokens, int32_t n_max);

/*
 * For command line programs: let Ctrl-C (SIGINT) abort a running llama_decode of ctx on the CPU, in front of the
 * handler that is installed already, which still runs. Process-wide; call it again to forget an earlier Ctrl-C.
 * A SIGINT that is ignored (as in background jobs) stays ignored.
 * SX_ERR_ARGUMENT: the handler could not be installed, nothing changed.
 */
SX_API int32_t sx_interrupt_watch(struct llama_context * ctx);

// For command line programs: drop llama.cpp's log, process-wide. (A log callback in Python would run Python's own
// SIGINT handler in the middle of a decode.)
SX_API void sx_log_silence(void);

// On: forget sx_last_error(), and let the first error that llama.cpp logs on this thread become it; the log goes where
// it went before, process-wide. Off: as before.
SX_API void sx_log_note_errors(bool on);

#ifdef __cplusplus
}
#endif
#endif
