// In front of the library's own sources in test_failures: what they ask for memory or of a device may be refused.
#ifndef FAILING_H
#define FAILING_H

#include <stdbool.h>
#include <stdlib.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "llama.h"

// Whether this request is refused; see test_failures.c.
bool is_refused(void);

static inline void * or_null_malloc(size_t size) {
    return is_refused() ? NULL : malloc(size);
}

static inline void * or_null_calloc(size_t n, size_t size) {
    return is_refused() ? NULL : calloc(n, size);
}

static inline void * or_null_realloc(void * old, size_t size) {
    return is_refused() ? NULL : realloc(old, size);
}

#define malloc  or_null_malloc
#define calloc  or_null_calloc
#define realloc or_null_realloc

#define ggml_init(...)                                   (is_refused() ? NULL : ggml_init(__VA_ARGS__))
#define ggml_gallocr_new(type)                           (is_refused() ? NULL : ggml_gallocr_new(type))
#define ggml_gallocr_alloc_graph(allocator, graph)       (is_refused() ? false : ggml_gallocr_alloc_graph(allocator, graph))
#define ggml_backend_dev_init(device, params)            (is_refused() ? NULL : ggml_backend_dev_init(device, params))
#define ggml_backend_alloc_ctx_tensors_from_buft(ctx, t) (is_refused() ? NULL : ggml_backend_alloc_ctx_tensors_from_buft(ctx, t))
#define ggml_backend_supports_op(backend, node)          (is_refused() ? false : ggml_backend_supports_op(backend, node))
#define ggml_backend_graph_compute(backend, graph) \
    (is_refused() ? GGML_STATUS_FAILED : ggml_backend_graph_compute(backend, graph))
#define llama_state_seq_get_data_ext(ctx, state, size, id, flags) \
    (is_refused() ? 0 : llama_state_seq_get_data_ext(ctx, state, size, id, flags))
#define llama_decode(ctx, batch)                         (is_refused() ? -2 : llama_decode(ctx, batch))

#endif
