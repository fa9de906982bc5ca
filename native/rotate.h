// Rotating rows of K tensors in place, on the device that owns them.
#ifndef SX_ROTATE_H
#define SX_ROTATE_H

#include <stdint.h>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "graph.h"

// The cached keys of one layer.
struct sx_layer {
    int                  index;         // layer number of the model
    struct ggml_tensor * keys;          // (n_cells, n_heads * head_dim), owned by the llama_context
    struct sx_rope       rope;          // rope.freq_factors is not kept; n_dims 0 = keys without RoPE
    float              * freq_factors;  // (n_dims / 2) host copy, or NULL
    int                  device;        // index into the devices, -1 = keys without RoPE
};

struct sx_device {
    ggml_backend_buffer_type_t buffer_type;
    ggml_backend_t             backend;
    ggml_gallocr_t             allocator;  // positions and scratch of a rotation
};

// Open the backend that can rotate `layer->keys` and check that it can. 0, or a status with a message.
int  sx_device_init(struct sx_device * device, const struct sx_layer * layer);
void sx_device_free(struct sx_device * device);

/*
 * Rotate rows r of the keys of all layers on `device` by delta[r] positions. Rows with delta 0 keep their values,
 * up to one more rounding where ggml cannot rotate in place (bf16, quantised types, keys mixed by a Hadamard matrix).
 * delta: (n_rows) int32. `layers`: (n_layers), those of other devices are skipped.
 * SX_ERR_MEMORY: nothing changed. SX_ERR_DEVICE: unknown state.
 */
int sx_device_rotate(
        struct sx_device * device, int device_index, const struct sx_layer * layers, int n_layers,
        const int32_t * delta, int32_t n_rows, int n_threads);

#endif
