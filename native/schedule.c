// Position arithmetic: integers in, integers out, no llama.cpp. The numpy twin is selfextend_gguf/schedule.py.
#include <stddef.h>

#include "error.h"
#include "selfextend.h"

/*
 * One schedule. A *stage* is a number that stands for key positions: while it lasts no cached key moves. Stage 0 is
 * the plain text, P(k) = k; what another number means is the schedule's own affair. To add a schedule, write these
 * three functions, add a line to SCHEDULES below and a name to enum sx_schedule.
 */
struct schedule {
    bool groups_within_trained;  // whether it may move keys of a text that fits the trained context

    // Stage of a step that decodes tokens [n_cached, n_total); SX_OK, or the status of an sx_fail that says what
    // step would work. Unless groups_within_trained, called for n_total > n_ctx_train only.
    int (*stage)(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage);

    // Token index at which a single token leaves `stage` for the next one.
    int64_t (*end)(const struct sx_params * p, int64_t stage);

    // Set P(k) of the keys that `stage` > 0 moves; positions holds P(k) = k. They are older than the neighbor window
    // of any step that `stage` was given for, hence cached.
    void (*move)(const struct sx_params * p, int64_t stage, int32_t * positions);
};

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t ceil_div(int64_t n, int64_t d) {
    return (n + d - 1) / d;
}

// Fail because a step from n_cached may go to token `reachable` only. Within the trained context any step works.
static int step_too_large(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t reachable) {
    const int64_t n_most = max64(reachable, p->n_ctx_train) - n_cached;
    if (n_most < 1) {
        return sx_fail(SX_ERR_SCHEDULE,
                "after %d tokens, a neighbor window of %d in blocks of %d leaves no distance below %d: "
                "take smaller blocks or a smaller window",
                (int) n_cached, p->neighbor_window, p->block_size, p->max_distance);
    }
    return sx_fail(SX_ERR_SCHEDULE,
            "%d tokens at once after %d cached ones leave no neighbor window of %d with distances below %d: "
            "decode at most %d",
            (int) (n_total - n_cached), (int) n_cached, p->neighbor_window, p->max_distance, (int) n_most);
}

// ---- Groups of G tokens, Self-Extend (arXiv 2401.01325). The stage is the boundary g: keys k < g share the positions
// g - g/G + k/G. Distance from query q: (q - g) + (g/G - k/G), the paper's for a window that ends at g.

// Number of positions the grouped keys [0, g) are moved towards the query: P(0) for a boundary g.
static int64_t shift_of(int64_t g, int64_t group_size) {
    return g - g / group_size;
}

static void move_groups(const struct sx_params * p, int64_t g, int32_t * positions) {
    const int32_t shift = (int32_t) shift_of(g, p->group_size);
    for (int64_t k = 0; k < g; ++k) {
        positions[k] = shift + (int32_t) k / p->group_size;
    }
}

// Smallest g with g - g/G >= shift; needs G >= 2 and shift >= 1. Each G tokens of g yield G - 1 positions, hence
// g = shift + ceil(shift / (G - 1)) is enough, and one less falls short whenever it is not a multiple of G.
static int64_t smallest_boundary(int64_t shift, int64_t group_size) {
    int64_t g = shift + ceil_div(shift, group_size - 1);
    while (shift_of(g - 1, group_size) >= shift) {
        g--;
    }
    return g;
}

static int selfextend_stage(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage) {
    if (p->group_size < 2) {
        return sx_fail(SX_ERR_SCHEDULE, "group size 1 cannot read beyond the trained context of %d tokens",
                p->n_ctx_train);
    }
    const int64_t shift = n_total - p->max_distance;  // the oldest key has to move up by this much
    int64_t g = 0;
    if (shift > 0) {
        g = ceil_div(smallest_boundary(shift, p->group_size), p->block_size) * p->block_size;
    }
    if (g > 0 && n_cached - g < p->neighbor_window) {
        return sx_fail(SX_ERR_SCHEDULE,
                "%d tokens at once after %d cached ones leave no neighbor window of %d with group size %d",
                (int) (n_total - n_cached), (int) n_cached, p->neighbor_window, p->group_size);
    }
    *stage = g;
    return SX_OK;
}

static int64_t selfextend_end(const struct sx_params * p, int64_t g) {
    return p->max_distance + shift_of(g, p->group_size);
}

// ---- Boundaries at a fixed window, which follow the text in blocks: between W and W + block - 1 keys stay exact.

static int64_t fixed_window_boundary(const struct sx_params * p, int64_t n_cached) {
    const int64_t W = p->neighbor_window;
    return n_cached > W ? (n_cached - W) / p->block_size * p->block_size : 0;
}

static int64_t fixed_window_end(const struct sx_params * p, int64_t g) {
    return g + p->block_size + p->neighbor_window;
}

// The same where distances reach max_distance before the boundary moves: `oldest` is the lowest position of a key.
static int64_t end_within(const struct sx_params * p, int64_t g, int64_t oldest) {
    return min64(fixed_window_end(p, g), oldest + p->max_distance);
}

static int paper_stage(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage) {
    const int64_t g = fixed_window_boundary(p, n_cached);
    if (n_total - shift_of(g, p->group_size) > p->max_distance && n_total > p->n_ctx_train) {
        return sx_fail(SX_ERR_SCHEDULE, "group size %d does not reach %d tokens with distances below %d",
                p->group_size, (int) n_total, p->max_distance);
    }
    *stage = g;
    return SX_OK;
}

static int64_t paper_end(const struct sx_params * p, int64_t g) {
    return min64(fixed_window_end(p, g), max64(p->n_ctx_train, shift_of(g, p->group_size) + p->max_distance));
}

// ---- ReRoPE (Su 2023, https://kexue.fm/archives/9708): the distance is min(q - k, W). The stage is the boundary g:
// all keys before it stand at g, seen at the one distance q - g >= W.

static int rerope_stage(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage) {
    const int64_t g = fixed_window_boundary(p, n_cached);
    if (n_total - g > p->max_distance) {
        return step_too_large(p, n_cached, n_total, g + p->max_distance);
    }
    *stage = g;
    return SX_OK;
}

static int64_t rerope_end(const struct sx_params * p, int64_t g) {
    return end_within(p, g, g);
}

static void move_to_boundary(const struct sx_params * p, int64_t g, int32_t * positions) {
    (void) p;
    for (int64_t k = 0; k < g; ++k) {
        positions[k] = (int32_t) g;
    }
}

// ---- Leaky ReRoPE (same source): beyond W the distance grows with a slope s below 1, W + (q - k - W) * s. The stage
// is the boundary g. Positions are whole numbers, so g*s and k*s are rounded down: P(k) = g - floor(g*s) + floor(k*s),
// less than one off. (Rounding the distance instead would regroup, and rewrite, many keys at each move.)

// Positions that all tokens beyond the window share: what window, block and the largest step leave of the distances.
static int64_t far_positions(const struct sx_params * p) {
    return (int64_t) p->max_distance - p->neighbor_window - p->block_size - p->n_batch + 1;
}

// floor(n * s), with the slope that takes the n_ctx - W tokens beyond the window to the far positions.
static int64_t on_slope(const struct sx_params * p, int64_t n) {
    return n * far_positions(p) / (p->n_ctx - p->neighbor_window);
}

static int leaky_rerope_stage(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage) {
    if (p->n_batch < 1 || far_positions(p) < 1 || p->max_distance > p->n_ctx_train) {
        return sx_fail(SX_ERR_ARGUMENT, "leaky-rerope needs n_batch >= 1 and "
                "neighbor_window + block_size + n_batch <= max_distance <= n_ctx_train");
    }
    if (n_total > p->n_ctx) {
        return sx_fail(SX_ERR_SCHEDULE, "the slope of leaky-rerope is that for %d tokens: plan for %d",
                p->n_ctx, (int) n_total);
    }
    const int64_t g      = fixed_window_boundary(p, n_cached);
    const int64_t oldest = g - on_slope(p, g);  // P(0)
    if (n_total - oldest > p->max_distance) {
        return step_too_large(p, n_cached, n_total, oldest + p->max_distance);
    }
    *stage = g;
    return SX_OK;
}

static int64_t leaky_rerope_end(const struct sx_params * p, int64_t g) {
    return min64(fixed_window_end(p, g), p->n_ctx);
}

static void move_on_slope(const struct sx_params * p, int64_t g, int32_t * positions) {
    const int64_t shift = g - on_slope(p, g);
    for (int64_t k = 0; k < g; ++k) {
        positions[k] = (int32_t) (shift + on_slope(p, k));
    }
}

// ---- Distances that begin again: keys before the boundary g, in groups of G, are seen from distance r = W/2 on, which
// near keys are seen at as well. With r = W it were Self-Extend; r = W/G is Jet-Long (arXiv 2607.07740), G = 1 with a
// fixed r STRING (arXiv 2410.18745). G is the smallest that g needs. The stage is g.

// W - r, with r rounded up: how far the grouped keys are moved into the window.
static int64_t moved_into_window(const struct sx_params * p) {
    return p->neighbor_window / 2;
}

static int64_t restart_group_size(const struct sx_params * p, int64_t g) {
    return max64(1, ceil_div(g, far_positions(p) + moved_into_window(p)));
}

static int restart_stage(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage) {
    if (p->n_batch < 1 || far_positions(p) < 1 || p->max_distance > p->n_ctx_train) {
        return sx_fail(SX_ERR_ARGUMENT, "restart needs n_batch >= 1 and "
                "neighbor_window + block_size + n_batch <= max_distance <= n_ctx_train");
    }
    const int64_t g      = fixed_window_boundary(p, n_cached);
    const int64_t oldest = min64(g, g + moved_into_window(p) - g / restart_group_size(p, g));
    if (n_total - oldest > p->max_distance) {
        return step_too_large(p, n_cached, n_total, oldest + p->max_distance);
    }
    *stage = g;
    return SX_OK;
}

static void move_again(const struct sx_params * p, int64_t g, int32_t * positions) {
    const int32_t size  = (int32_t) restart_group_size(p, g);
    const int32_t shift = (int32_t) (g + moved_into_window(p) - g / size);
    for (int32_t k = 0; k < g; ++k) {
        positions[k] = shift + k / size;
    }
}

// ---- Dual chunk attention (arXiv 2402.17463), as far as one position a key can express it: chunks of block_size
// tokens before the boundary g, of which the latest is exact and the older ones lie on top of it. The stage is g.

static int64_t dca_oldest(const struct sx_params * p, int64_t g) {
    return max64(0, g - p->block_size);
}

static int dca_stage(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage) {
    const int64_t g      = fixed_window_boundary(p, n_cached);
    const int64_t oldest = dca_oldest(p, g);
    if (n_total - oldest > p->max_distance) {
        return step_too_large(p, n_cached, n_total, oldest + p->max_distance);
    }
    *stage = g;
    return SX_OK;
}

static int64_t dca_end(const struct sx_params * p, int64_t g) {
    return end_within(p, g, dca_oldest(p, g));
}

static void move_onto_chunk(const struct sx_params * p, int64_t g, int32_t * positions) {
    for (int32_t k = 0; k < g; ++k) {
        positions[k] = (int32_t) g - p->block_size + k % p->block_size;
    }
}

// ---- AdaGroPE (ACL 2025, long paper 28, Algorithm 1): a text of N tokens has P = max_distance positions, reused more
// often with growing distance; the nearest quarter (r = 0.25) is exact. Stage j > 0 is the map for a text that ends
// with the j-th block after the trained context, N = L + j * block: P(k) = N - 1 - f(N - 1 - k). The queries before
// the last one of the block see far keys a little nearer than f says, and the latest ones exact all the same.

// Distances [distance, next.distance) have the positions from `position` on, each one `reuse` times.
struct run {
    int64_t distance, position, reuse;
};
enum { MAX_RUNS = 34 };  // one for each power of two below 2^31, and the rest in two

// Algorithm 1 for N > P >= 1. The loop jumps over the G between powers of two, where nothing happens until the
// positions that are left, each reused G times, reach N. Returns the number of runs.
static int adagrope_runs(int64_t P, int64_t N, struct run runs[MAX_RUNS]) {
    int n = 0;
    struct run at = { 0, 0, 1 };
    while ((P - at.position) * at.reuse < N - at.distance) {
        const int64_t G = at.reuse, fixed = P / (4 * G);
        if (fixed > 0) {
            runs[n++] = at;
        }
        at.position += fixed;
        at.distance += fixed * G;
        at.reuse     = min64(2 * G, ceil_div(N - at.distance, P - at.position));
    }
    // The rest: G - 1 times near, G times far, so that exactly N distances are covered.
    const int64_t G = at.reuse, left = P - at.position;
    const int64_t far = N - at.distance - (G - 1) * left, near = left - far;
    if (near > 0) {
        runs[n++] = (struct run) { at.distance, at.position, G - 1 };
    }
    runs[n++] = (struct run) { at.distance + near * (G - 1), at.position + near, G };
    return n;
}

static int64_t adagrope_text(const struct sx_params * p, int64_t stage) {
    return p->n_ctx_train + stage * p->block_size;
}

// First key that a stage keeps exact.
static int64_t adagrope_boundary(const struct sx_params * p, int64_t stage) {
    return adagrope_text(p, stage) - p->max_distance / 4;
}

static int adagrope_stage(const struct sx_params * p, int64_t n_cached, int64_t n_total, int64_t * stage) {
    if (p->max_distance > p->n_ctx_train) {
        return sx_fail(SX_ERR_ARGUMENT, "adagrope needs max_distance <= n_ctx_train");
    }
    const int64_t j = ceil_div(n_total - p->n_ctx_train, p->block_size);
    if (n_cached - adagrope_boundary(p, j) < p->neighbor_window) {
        // The last stage whose boundary leaves the window.
        const int64_t last = (n_cached - p->neighbor_window - adagrope_boundary(p, 0)) / p->block_size;
        return step_too_large(p, n_cached, n_total, adagrope_text(p, last));
    }
    *stage = j;
    return SX_OK;
}

static void move_adaptively(const struct sx_params * p, int64_t stage, int32_t * positions) {
    struct run runs[MAX_RUNS];
    const int64_t last = adagrope_text(p, stage) - 1;  // the query that the distances are counted from
    int at = adagrope_runs(p->max_distance, last + 1, runs) - 1;
    for (int64_t k = 0; k < adagrope_boundary(p, stage); ++k) {
        const int64_t distance = last - k;
        while (distance < runs[at].distance) {
            at--;
        }
        positions[k] = (int32_t) (last - runs[at].position - (distance - runs[at].distance) / runs[at].reuse);
    }
}

// ---- The table and the three functions of the header, which know no schedule in particular.

static const struct schedule SCHEDULES[] = {
    [SX_SCHEDULE_SELFEXTEND]   = { false, selfextend_stage,   selfextend_end,   move_groups      },
    [SX_SCHEDULE_PAPER]        = { true,  paper_stage,        paper_end,        move_groups      },
    [SX_SCHEDULE_ADAGROPE]     = { false, adagrope_stage,     adagrope_text,    move_adaptively  },
    [SX_SCHEDULE_REROPE]       = { false, rerope_stage,       rerope_end,       move_to_boundary },
    [SX_SCHEDULE_LEAKY_REROPE] = { false, leaky_rerope_stage, leaky_rerope_end, move_on_slope    },
    [SX_SCHEDULE_RESTART]      = { false, restart_stage,      fixed_window_end, move_again       },
    [SX_SCHEDULE_DCA]          = { false, dca_stage,          dca_end,          move_onto_chunk  },
};

static bool is_plain(const struct sx_params * p, int32_t n_total) {
    return n_total <= p->n_ctx_train && !SCHEDULES[p->schedule].groups_within_trained;
}

static int check(const struct sx_params * p, int32_t n_cached, int32_t n_total) {
    if (p->schedule < 0 || (size_t) p->schedule >= sizeof(SCHEDULES) / sizeof(SCHEDULES[0])) {
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

int32_t sx_schedule_stage(const struct sx_params * p, int32_t n_cached, int32_t n_total, int32_t * stage) {
    int status = check(p, n_cached, n_total);
    int64_t found = 0;
    if (status == SX_OK && !is_plain(p, n_total)) {
        status = SCHEDULES[p->schedule].stage(p, n_cached, n_total, &found);
    }
    if (status == SX_OK) {
        *stage = (int32_t) found;
    }
    return status;
}

int32_t sx_schedule_step(const struct sx_params * p, int32_t n_cached, int32_t n_new, int32_t * n_step) {
    if (n_cached >= 0 && (n_new < 1 || n_new > INT32_MAX - n_cached)) {
        return sx_fail(SX_ERR_ARGUMENT, "a step needs at least one new token, not %d", n_new);
    }
    int32_t stage = 0;
    const int32_t status = sx_schedule_stage(p, n_cached, n_cached + 1, &stage);
    if (status != SX_OK) {
        return status;
    }
    const int64_t end = is_plain(p, n_cached + 1) ? p->n_ctx_train : SCHEDULES[p->schedule].end(p, stage);
    *n_step = (int32_t) min64(n_new, end - n_cached);
    return SX_OK;
}

int32_t sx_schedule_positions(const struct sx_params * p, int32_t n_cached, int32_t n_total, int32_t * positions) {
    int32_t stage = 0;
    const int32_t status = sx_schedule_stage(p, n_cached, n_total, &stage);
    if (status != SX_OK) {
        return status;
    }
    for (int32_t k = 0; k < n_cached; ++k) {
        positions[k] = k;
    }
    if (stage > 0) {
        SCHEDULES[p->schedule].move(p, stage, positions);
    }
    return SX_OK;
}
