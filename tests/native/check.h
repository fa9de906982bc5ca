// The smallest test harness: CHECK prints the failing line and ends the program with status 1.
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "selfextend.h"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, sx_last_error()); \
            exit(1); \
        } \
    } while (0)

#endif
