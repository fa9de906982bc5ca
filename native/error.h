// The per-thread message behind sx_last_error().
#ifndef SX_ERROR_H
#define SX_ERROR_H

#ifdef __cplusplus
extern "C" {
#endif

// Store a printf-style message and return `status`, so that `return sx_fail(SX_ERR_X, "...")` reads well.
__attribute__((format(printf, 2, 3))) int sx_fail(int status, const char * format, ...);

#ifdef __cplusplus
}
#endif
#endif
