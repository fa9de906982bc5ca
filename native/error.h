// The per-thread message behind sx_last_error().
#ifndef SX_ERROR_H
#define SX_ERROR_H

// Store a printf-style message and return `status`, so that `return sx_fail(SX_ERR_X, "...")` reads well.
__attribute__((format(printf, 2, 3))) int sx_fail(int status, const char * format, ...);

#endif
