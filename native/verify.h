// Whether layers hold their keys as their graph says, asked of llama.cpp itself.
#ifndef SX_VERIFY_H
#define SX_VERIFY_H

#include "layers.h"

// Where llama.cpp computes the keys that moved ones are compared with. Far enough that slow pairs move by more than f32
// loses, near enough that f32 angles are right to 0.003 rad on any device. It need not be a trained position.
enum { SX_PROBE_POSITION = 8191 };

// A row that a layer writes to its cache of keys or of values, before it is rounded to the type of that cache.
struct sx_written {
    int     layer;
    bool    is_key;
    int64_t n;
    float * row;  // (n)
};

// All that the decode of one token writes.
struct sx_probe {
    struct sx_written * written;  // (n)
    int n;
};

// Decode the BOS token (or token 0) at `position` in the empty memory of ctx. 0, or a status.
int sx_decode_probe(struct llama_context * ctx, llama_pos position);

/*
 * For the callback of ctx, during such a decode: note what `node`, just computed, has written. Every node of the graph
 * must be asked for, else a backend may join the write with what comes before and never store what it writes.
 * 0, or a status.
 */
int sx_probe_note(struct sx_probe * probe, const struct ggml_tensor * node);

void sx_probe_free(struct sx_probe * probe);

/*
 * Verify that rotating keys as the layers say gives the keys that llama.cpp computes elsewhere, and that the layers' own
 * caches are rotated like that, on the devices that hold them. `here` and `there`: the decodes at positions 0 and
 * SX_PROBE_POSITION. Overwrites the first cells of the caches. 0, or a status.
 */
int sx_layers_verify(
        struct sx_layers * layers, const struct sx_probe * here, const struct sx_probe * there, int n_threads);

#endif
