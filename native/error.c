#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#include "selfextend.h"

static _Thread_local char last_error[512];

int sx_fail(int status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(last_error, sizeof(last_error), format, args);
    va_end(args);
    return status;
}

const char * sx_last_error(void) {
    return last_error;
}

const char * sx_built_against(void) {
    return SX_LLAMA_CPP_PYTHON_VERSION;
}
