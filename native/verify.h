// Whether layers hold their keys as their graph says, asked of llama.cpp itself.
#ifndef SX_VERIFY_H
#define SX_VERIFY_H

#include "layers.h"

// Decode the BOS token (or token 0) at `position` in the empty memory of ctx. 0, or a status.
int sx_decode_probe(struct llama_context * ctx, llama_pos position);

/*
 * Verify, in every layer, that rotating the key of the token that sx_decode_probe(ctx, 0) left in the memory of ctx gives
 * the keys that llama.cpp computes elsewhere. Leaves a token in the memory of ctx. 0, or a status.
 */
int sx_layers_verify(struct sx_layers * layers, struct llama_context * ctx);

#endif
