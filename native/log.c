// llama.cpp's log: dropped, or watched for the reason why a call failed.
#include <pthread.h>
#include <string.h>

#include "error.h"
#include "selfextend.h"

static _Thread_local bool is_noting;
static int n_noting;  // threads
static struct {
    ggml_log_callback callback;
    void * user_data;
} previous;
static pthread_mutex_t installing = PTHREAD_MUTEX_INITIALIZER;

static void drop(enum ggml_log_level level, const char * text, void * unused) {
    (void) level;
    (void) text;
    (void) unused;
}

void sx_log_silence(void) {
    llama_log_set(drop, NULL);
}

// The first error is the reason, later ones are its consequences.
static void note(enum ggml_log_level level, const char * text, void * unused) {
    (void) unused;
    if (is_noting && level == GGML_LOG_LEVEL_ERROR && sx_last_error()[0] == '\0') {
        const char * message = strstr(text, ": ");  // after the name of llama.cpp's function
        message = message ? message + 2 : text;
        sx_fail(SX_ERR_MODEL, "%.*s", (int) strcspn(message, "\n"), message);
    }
    if (previous.callback) {
        previous.callback(level, text, previous.user_data);
    }
}

// While a thread notes errors `note` is in front of the callback that was there.
static void install(int n_more) {
    ggml_log_callback current = NULL;
    void * user_data = NULL;
    pthread_mutex_lock(&installing);
    n_noting += n_more;
    llama_log_get(&current, &user_data);
    if (n_noting > 0 && current != note) {
        previous.callback  = current;
        previous.user_data = user_data;
        llama_log_set(note, NULL);
    } else if (n_noting == 0 && current == note) {
        llama_log_set(previous.callback, previous.user_data);
    }
    pthread_mutex_unlock(&installing);
}

void sx_log_note_errors(bool on) {
    if (on) {
        sx_fail(SX_OK, "%s", "");
    }
    install(on - is_noting);
    is_noting = on;
}
