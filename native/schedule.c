// Position arithmetic: integers in, integers out, no llama.cpp. The numpy twin is selfextend_gguf/schedule.py.
#include <stddef.h>

#include "error.h"
#include "selfextend.h"

// Number of positions the grouped keys [0, g) are moved towards the query: P(0) for a boundary g.
static int64_t shift_of(int64_t g, int64_t group_size) {
    return g - g / group_size;
}

// Smallest g with g - g/G >= shift; needs G >= 2. Each G tokens of g yield G - 1 positions, hence
// g = shift + ceil(shift / (G - 1)) is enough, and one less falls short whenever it is not a multiple of G.
static int64_t smallest_boundary(int64_t shift, int64_t group_size) {
    int64_t g = shift + (shift + group_size - 2) / (group_size - 1);
    while (g > 0 && shift_of(g - 1, group_size) >= shift) {
        g--;
    }
    return g;
}

static int64_t round_up(int64_t n, int64_t step) {
    return (n + step - 1) / step * step;
}

static int check(const struct sx_params * p, int32_t n_cached, int32_t n_total) {
    if (p->schedule != SX_SCHEDULE_SELFEXTEND && p->schedule != SX_SCHEDULE_PAPER) {
        return sx_fail(SX_ERR_ARGUMENT, "unknown schedule %d", p->schedule);
    }
    if (p->n_ctx_train < 1 || p->group_size < 1 || p->neighbor_window < 1 || p->max_distance < 1 || p->block_size < 1) {
        return sx_fail(SX_ERR_ARGUMENT, "schedule parameters must be positive");
    }
    if (n_cached < 0 || n_total < n_cached) {
        return sx_fail(SX_ERR_ARGUMENT, "a step needs 0 <= n_cached <= n_total, not %d and %d", n_cached, n_total);
    }
    return SX_OK;
}

int32_t sx_schedule_boundary(const struct sx_params * p, int32_t n_cached, int32_t n_total, int32_t * boundary) {
    const int status = check(p, n_cached, n_total);
    if (status != SX_OK) {
        return status;
    }
    const int64_t D = p->max_distance, W = p->neighbor_window, G = p->group_size, block = p->block_size;

    int64_t g = 0;
    if (p->schedule == SX_SCHEDULE_PAPER) {
        g = n_cached > W ? (n_cached - W) / block * block : 0;
    } else if (n_total > p->n_ctx_train) {
        const int64_t shift = n_total - D;  // the oldest key has to move up by this much
        if (G < 2) {
            return sx_fail(SX_ERR_SCHEDULE, "group size 1 cannot read beyond the trained context of %d tokens",
                    p->n_ctx_train);
        }
        g = shift > 0 ? round_up(smallest_boundary(shift, G), block) : 0;
    }
    if (g > 0 && n_cached - g < W) {
        return sx_fail(SX_ERR_SCHEDULE,
                "%d tokens at once after %d cached ones leave no neighbor window of %d with group size %d",
                n_total - n_cached, n_cached, p->neighbor_window, p->group_size);
    }
    if (p->schedule == SX_SCHEDULE_PAPER && n_total - shift_of(g, G) > D && n_total > p->n_ctx_train) {
        return sx_fail(SX_ERR_SCHEDULE, "group size %d does not reach %d tokens with distances below %d",
                p->group_size, n_total, p->max_distance);
    }
    *boundary = (int32_t) g;
    return SX_OK;
}

int32_t sx_schedule_step(const struct sx_params * p, int32_t n_cached, int32_t n_new, int32_t * n_step) {
    if (n_new < 1 || n_new > INT32_MAX - n_cached) {
        return sx_fail(SX_ERR_ARGUMENT, "a step needs at least one new token, not %d", n_new);
    }
    int32_t g = 0;
    const int32_t status = sx_schedule_boundary(p, n_cached, n_cached + 1, &g);
    if (status != SX_OK) {
        return status;
    }
    int64_t end;  // the boundary is g for every single token up to here
    if (p->schedule == SX_SCHEDULE_PAPER) {
        end = (int64_t) g + p->block_size + p->neighbor_window;
    } else if (n_cached < p->n_ctx_train) {
        end = p->n_ctx_train;
    } else {
        end = p->max_distance + shift_of(g, p->group_size);
    }
    *n_step = end - n_cached < n_new ? (int32_t) (end - n_cached) : n_new;
    return SX_OK;
}

int32_t sx_schedule_positions(const struct sx_params * p, int32_t n_cached, int32_t n_total, int32_t * positions) {
    int32_t g = 0;
    const int32_t status = sx_schedule_boundary(p, n_cached, n_total, &g);
    if (status != SX_OK) {
        return status;
    }
    const int32_t shift = (int32_t) shift_of(g, p->group_size);
    for (int32_t k = 0; k < g; ++k) {
        positions[k] = shift + k / p->group_size;
    }
    for (int32_t k = g; k < n_cached; ++k) {
        positions[k] = k;
    }
    return SX_OK;
}
