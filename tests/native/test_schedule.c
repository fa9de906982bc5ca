// The schedules from C: their codes, and that a failing call writes nothing.
#include <limits.h>
#include <string.h>

#include "check.h"

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
    for (int schedule = SX_SCHEDULE_SELFEXTEND; schedule <= SX_SCHEDULE_LEAKY_REROPE; ++schedule) {
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
    puts("ok");
    return 0;
}
