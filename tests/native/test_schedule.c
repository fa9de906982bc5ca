// The schedules from C: their codes, and that a failing call writes nothing.
#include <limits.h>
#include <string.h>

#include "check.h"

int main(void) {
    const struct sx_params p = {
        .schedule = SX_SCHEDULE_SELFEXTEND, .n_ctx_train = 32, .group_size = 4, .neighbor_window = 8,
        .max_distance = 32, .block_size = 4,
    };
    int32_t positions[64], g = -7;

    // Within the trained context nothing is grouped.
    CHECK(sx_schedule_boundary(&p, 28, 32, &g) == SX_OK && g == 0);
    CHECK(sx_schedule_positions(&p, 28, 32, positions) == SX_OK);
    for (int k = 0; k < 28; ++k) {
        CHECK(positions[k] == k);
    }
    // n1 - D = 12; 16 - 16/4 = 12, a multiple of the block.
    CHECK(sx_schedule_boundary(&p, 40, 44, &g) == SX_OK && g == 16);
    CHECK(sx_schedule_positions(&p, 40, 44, positions) == SX_OK);
    CHECK(positions[0] == 12 && positions[3] == 12 && positions[4] == 13 && positions[15] == 15 && positions[16] == 16);

    // Failures leave the output alone.
    g = -7;
    memset(positions, 0x55, sizeof(positions));
    CHECK(sx_schedule_boundary(&p, 10, 60, &g) == SX_ERR_SCHEDULE && g == -7);
    CHECK(sx_schedule_positions(&p, 10, 60, positions) == SX_ERR_SCHEDULE && positions[0] == 0x55555555);
    CHECK(strlen(sx_last_error()) > 0);
    CHECK(sx_schedule_boundary(&p, -1, 4, &g) == SX_ERR_ARGUMENT);
    CHECK(sx_schedule_boundary(&p, 5, 4, &g) == SX_ERR_ARGUMENT);
    struct sx_params bad = p;
    bad.group_size = 0;
    CHECK(sx_schedule_boundary(&bad, 1, 2, &g) == SX_ERR_ARGUMENT);
    bad = p;
    bad.schedule = 99;
    CHECK(sx_schedule_boundary(&bad, 1, 2, &g) == SX_ERR_ARGUMENT);

    // No overflow at the end of the range.
    struct sx_params large = p;
    large.group_size = INT_MAX;
    large.block_size = INT_MAX;
    large.schedule   = SX_SCHEDULE_PAPER;
    CHECK(sx_schedule_boundary(&large, INT_MAX - 1, INT_MAX, &g) == SX_ERR_SCHEDULE);
    large.schedule = SX_SCHEDULE_SELFEXTEND;
    CHECK(sx_schedule_boundary(&large, INT_MAX - 1, INT_MAX, &g) == SX_ERR_SCHEDULE);
    puts("ok");
    return 0;
}
