// The layers of a context whose keys are rewritten, found in a compute graph.
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

// Look at the next node of a running graph: if it writes keys to a cache, note the layer. 0, or a status.
int sx_layers_look_at(struct sx_layers * layers, const struct ggml_tensor * node);

/*
 * Keep, of the layers noted while one token was decoded at position 0, those whose keys are seen from any distance, and
 * open the devices that own them. The token must still be in the memory of ctx. 0, or a status.
 */
int sx_layers_settle(struct sx_layers * layers, struct llama_context * ctx);

// Leave out the layers whose keys are not rotated.
void sx_layers_drop_unrotated(struct sx_layers * layers);

void sx_layers_free(struct sx_layers * layers);

#endif
