#include "aborts.h"

#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "selfextend.h"

namespace {

thread_local int n_watches = 0;  // of this thread
std::mutex mutex;
int n_threads                  = 0;  // with a watch, and the callback is installed while there is one
ggml_abort_callback_t previous = nullptr;

// ggml_abort calls this and then abort(), so that an exception is the only way back.
void on_abort(const char * message) {
    if (n_watches > 0) {
        const char * reason = strstr(message, ": ");  // after file and line
        throw std::runtime_error(reason ? reason + 2 : message);
    }
    fprintf(stderr, "%s\n", message);  // as ggml_abort does without a callback, but for the backtrace
}

}  // namespace

namespace sx {

abort_watch::abort_watch() {
    if (n_watches++ > 0) {
        return;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (n_threads++ == 0) {
        previous = ggml_set_abort_callback(on_abort);
    }
}

abort_watch::~abort_watch() {
    if (--n_watches > 0) {
        return;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (--n_threads == 0) {
        ggml_set_abort_callback(previous);
    }
}

}  // namespace sx

// llama_model_load_from_file and llama_init_from_model catch exceptions, log them as errors, and return NULL.
void sx_aborts_throw(bool on) {
    thread_local std::unique_ptr<sx::abort_watch> watch;
    if (on && !watch) {
        watch = std::make_unique<sx::abort_watch>();
    } else if (!on) {
        watch.reset();
    }
}
