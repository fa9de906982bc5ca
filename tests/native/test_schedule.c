// The schedules from C: their codes, and that a failing call writes nothing.
#include <limits.h>
#include <string.h>

#include "check.h"

// ---- random parameters -------------------------------------------------------------------------------------------

enum { N_RANDOM = 200000, LONGEST = 700 };

static uint32_t state = 1;

static int32_t up_to(int32_t most) {
    state = state * 1664525u + 1013904223u;
    return 1 + (int32_t) ((state >> 8) % (uint32_t) most);
}

// Whether a step is planned. What is planned are positions of the text, at distances below the largest one if the text
// exceeds the trained context.
static bool is_planned(const struct sx_params * p, int32_t n_cached, int32_t n_total) {
    int32_t positions[LONGEST];
    if (sx_schedule_positions(p, n_cached, n_total, positions) != SX_OK) {
        return false;
    }
    for (int32_t k = 0; k < n_cached; ++k) {
        CHECK(positions[k] >= 0 && positions[k] < n_total);
        CHECK(n_total <= p->n_ctx_train || n_total - 1 - positions[k] < p->max_distance);
    }
    return true;
}

// One step with any parameters; returns how much of it worked. A step that is advised has to work.
static int step_randomly(void) {
    const int32_t n_ctx_train = up_to(64);
    struct sx_params p = {
        .schedule = up_to(SX_SCHEDULE_DCA + 1) - 1, .n_ctx_train = n_ctx_train, .group_size = up_to(9),
        .neighbor_window = up_to(n_ctx_train), .max_distance = up_to(3) == 1 ? up_to(n_ctx_train + 4) : n_ctx_train,
        .block_size = up_to(12),
        .n_ctx = up_to(LONGEST), .n_batch = up_to(16),
    };
    if (up_to(50) == 1) {
        int32_t * const numbers = &p.schedule;
        numbers[up_to(8) - 1] = up_to(3) == 1 ? INT_MAX : up_to(5) - 3;
    }
    const int32_t n_cached = up_to(LONGEST - 1) - 1, n_total = n_cached + up_to(LONGEST - n_cached);
    int32_t n_step = 0;
    const bool is_advised = sx_schedule_step(&p, n_cached, n_total - n_cached, &n_step) == SX_OK;
    if (is_advised) {
        CHECK(n_step >= 1 && n_step <= n_total - n_cached && is_planned(&p, n_cached, n_cached + n_step));
    }
    return is_advised + is_planned(&p, n_cached, n_total);
}

int main(void) {
    const struct sx_params p = {
        .schedule = SX_SCHEDULE_SELFEXTEND, .n_ctx_train = 32, .group_size = 4, .neighbor_window = 8,
        .max_distance = 32, .block_size = 4,
    };
    int32_t positions[64], stage = -7;

    // Within the trained context nothing is grouped: stage 0.
    CHECK(sx_schedule_stage(&p, 28, 32, &stage) == SX_OK && stage == 0);
    CHECK(sx_schedule_positions(&p, 28, 32, positions) == SX_OK);
    for (int k = 0; k < 28; ++k) {
        CHECK(positions[k] == k);
    }
    // n1 - D = 12; 16 - 16/4 = 12, a multiple of the block. The stage is the boundary.
    CHECK(sx_schedule_stage(&p, 40, 44, &stage) == SX_OK && stage == 16);
    CHECK(sx_schedule_positions(&p, 40, 44, positions) == SX_OK);
    CHECK(positions[0] == 12 && positions[3] == 12 && positions[4] == 13 && positions[15] == 15 && positions[16] == 16);

    // Failures leave the output alone.
    stage = -7;
    memset(positions, 0x55, sizeof(positions));
    CHECK(sx_schedule_stage(&p, 10, 60, &stage) == SX_ERR_SCHEDULE && stage == -7);
    CHECK(sx_schedule_positions(&p, 10, 60, positions) == SX_ERR_SCHEDULE && positions[0] == 0x55555555);
    CHECK(strlen(sx_last_error()) > 0);
    CHECK(sx_schedule_stage(&p, -1, 4, &stage) == SX_ERR_ARGUMENT);
    CHECK(sx_schedule_stage(&p, 5, 4, &stage) == SX_ERR_ARGUMENT);
    CHECK(sx_schedule_step(&p, 5, 0, &stage) == SX_ERR_ARGUMENT);
    CHECK(sx_schedule_step(&p, 5, INT_MAX, &stage) == SX_ERR_ARGUMENT && stage == -7);
    struct sx_params bad = p;
    bad.group_size = 0;
    CHECK(sx_schedule_stage(&bad, 1, 2, &stage) == SX_ERR_ARGUMENT);
    bad = p;
    bad.schedule = 99;
    CHECK(sx_schedule_stage(&bad, 1, 2, &stage) == SX_ERR_ARGUMENT);

    // The same step under the others: W and block put the boundary at (40 - 8)/4*4 = 32.
    struct sx_params other = p;
    other.schedule = SX_SCHEDULE_REROPE;
    CHECK(sx_schedule_positions(&other, 40, 44, positions) == SX_OK);
    CHECK(positions[0] == 32 && positions[31] == 32 && positions[39] == 39);
    // 32 - 8 - 4 - 4 + 1 = 17 positions for the 64 - 8 = 56 tokens beyond it: 32 * 17/56 = 9.7, 7 * 17/56 = 2.1.
    other.schedule = SX_SCHEDULE_LEAKY_REROPE;
    other.n_ctx    = 64;
    other.n_batch  = 4;
    CHECK(sx_schedule_positions(&other, 40, 44, positions) == SX_OK);
    CHECK(positions[0] == 32 - 9 && positions[7] == 32 - 9 + 2 && positions[32] == 32 && positions[39] == 39);
    CHECK(sx_schedule_step(&other, 60, 10, &stage) == SX_OK && stage == 4);  // the slope ends with the text
    CHECK(sx_schedule_stage(&other, 64, 65, &stage) == SX_ERR_SCHEDULE);
    other.n_batch = 0;
    CHECK(sx_schedule_stage(&other, 40, 44, &stage) == SX_ERR_ARGUMENT);
    // The map for N = 44 tokens (the third block of 4) in 32 positions: 8 are fixed, 24 left for 36 distances, so 12 of
    // them once and 12 twice. Distances 0..19 are exact, those of the oldest 24 keys are 20 + (distance - 20)/2.
    other.schedule        = SX_SCHEDULE_ADAGROPE;
    other.neighbor_window = 4;
    CHECK(sx_schedule_stage(&other, 40, 44, &stage) == SX_OK && stage == 3);
    CHECK(sx_schedule_positions(&other, 40, 44, positions) == SX_OK);
    CHECK(positions[0] == 43 - 31 && positions[1] == 43 - 31 && positions[2] == 43 - 30 && positions[24] == 24);

    // No overflow at the end of the range.
    for (int schedule = SX_SCHEDULE_SELFEXTEND; schedule <= SX_SCHEDULE_DCA; ++schedule) {
        struct sx_params large = p;
        large.schedule = schedule;
        large.n_ctx    = INT_MAX;
        large.n_batch  = 4;
        int32_t step;
        sx_schedule_stage(&large, INT_MAX - 1, INT_MAX, &stage);
        sx_schedule_step(&large, INT_MAX - 1, 1, &step);
        CHECK(sx_schedule_step(&large, INT_MAX, 1, &step) == SX_ERR_ARGUMENT);
        CHECK(sx_schedule_step(&large, INT_MIN, 1, &step) == SX_ERR_ARGUMENT);
        large.group_size = large.block_size = INT_MAX;
        CHECK(sx_schedule_stage(&large, INT_MAX - 1, INT_MAX, &stage) < 0);
        large.n_ctx_train = large.max_distance = large.neighbor_window = INT_MAX - 1;
        sx_schedule_stage(&large, INT_MAX - 1, INT_MAX, &stage);
        sx_schedule_step(&large, INT_MAX - 1, 1, &step);
    }
    int n_worked = 0;
    for (int i = 0; i < N_RANDOM; ++i) {
        n_worked += step_randomly();
    }
    CHECK(n_worked > N_RANDOM / 5 && n_worked < 2 * N_RANDOM);
    puts("ok");
    return 0;
}
