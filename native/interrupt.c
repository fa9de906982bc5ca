// Ctrl-C while llama.cpp computes: Python sees a signal only when the running call returns, which on a slow machine
// can take half a minute. A handler in front of Python's sets a flag that llama.cpp polls between graph nodes.
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>

#include "error.h"
#include "selfextend.h"

static atomic_int interrupted;  // by a signal, on whichever thread it reaches
static struct sigaction previous;
static pthread_mutex_t installing = PTHREAD_MUTEX_INITIALIZER;

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

static int install(void) {
    struct sigaction current, ours;
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
    return SX_OK;
}

int32_t sx_interrupt_watch(struct llama_context * ctx) {
    if (!ctx) {
        return sx_fail(SX_ERR_ARGUMENT, "there is no context");
    }
    pthread_mutex_lock(&installing);
    const int status = install();
    pthread_mutex_unlock(&installing);
    if (status != SX_OK) {
        return status;
    }
    interrupted = 0;
    llama_set_abort_callback(ctx, is_interrupted, NULL);
    return SX_OK;
}
