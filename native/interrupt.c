// Ctrl-C while llama.cpp computes: Python sees a signal only when the running call returns, which on a slow machine
// can take half a minute. A handler in front of Python's sets a flag that llama.cpp polls between graph nodes.
#include <signal.h>
#include <string.h>

#include "error.h"
#include "selfextend.h"

static volatile sig_atomic_t interrupted;
static struct sigaction previous;

static void on_interrupt(int number, siginfo_t * info, void * context) {
    interrupted = 1;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(number);
    }
}

static bool is_interrupted(void * unused) {
    (void) unused;
    return interrupted != 0;
}

int32_t sx_interrupt_watch(struct llama_context * ctx) {
    struct sigaction current, ours;
    if (!ctx) {
        return sx_fail(SX_ERR_ARGUMENT, "there is no context");
    }
    if (sigaction(SIGINT, NULL, &current) != 0) {
        return sx_fail(SX_ERR_ARGUMENT, "cannot read the handler of SIGINT");
    }
    const bool is_ours = (current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_interrupt;
    if (!is_ours && current.sa_handler != SIG_IGN) {
        previous = current;
        memset(&ours, 0, sizeof(ours));
        ours.sa_sigaction = on_interrupt;
        ours.sa_flags     = SA_SIGINFO | (current.sa_flags & SA_ONSTACK);
        sigemptyset(&ours.sa_mask);
        if (sigaction(SIGINT, &ours, NULL) != 0) {
            return sx_fail(SX_ERR_ARGUMENT, "cannot install a handler of SIGINT");
        }
    }
    interrupted = 0;
    llama_set_abort_callback(ctx, is_interrupted, NULL);
    return SX_OK;
}
