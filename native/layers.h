// The layers of a context whose keys are rewritten: found in a compute graph, verified against llama.cpp itself.
#ifndef SX_LAYERS_H
#define SX_LAYERS_H

#include "llama.h"
#include "rotate.h"

enum { SX_MAX_DEVICES = 16 };

struct sx_layers {
    struct sx_layer * layer;  // (n)
    int  n;
    struct sx_trail trail;    // the graph they are found in, until they are settled
    bool any_local;           // layers that look back at a window only were left out
    struct sx_device device[SX_MAX_DEVICES];
    int  n_devices;
};

// Decode the BOS token (or token 0) at `position` in the empty memory of ctx. 0, or a status.
int sx_layers_decode_probe(struct llama_context * ctx, llama_pos position);

// Look at the next node of a running graph: if it writes keys to a cache, note the layer. 0, or a status.
int sx_layers_look_at(struct sx_layers * layers, const struct ggml_tensor * node);

/*
 * Keep, of the layers noted while sx_layers_decode_probe(ctx, 0) ran, those whose keys are rotated and seen from
 * any distance; open the devices that own them; and verify on that token that rotating its keys by some positions
 * gives the keys that llama.cpp computes there. Leaves a token in the memory of ctx. 0, or a status.
 */
int sx_layers_settle(struct sx_layers * layers, struct llama_context * ctx);

void sx_layers_free(struct sx_layers * layers);

#endif
