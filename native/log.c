// llama.cpp's log: dropped, or watched for the reason why a call failed.
#include <string.h>

#include "error.h"
#include "selfextend.h"

static struct {
    ggml_log_callback callback;
    void * user_data;
} previous;

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
    if (level == GGML_LOG_LEVEL_ERROR && sx_last_error()[0] == '\0') {
        const char * message = strstr(text, ": ");  // after the name of llama.cpp's function
        message = message ? message + 2 : text;
        sx_fail(SX_ERR_MODEL, "%.*s", (int) strcspn(message, "\n"), message);
    }
    if (previous.callback) {
        previous.callback(level, text, previous.user_data);
    }
}

void sx_log_note_errors(bool on) {
    ggml_log_callback current = NULL;
    void * user_data = NULL;
    llama_log_get(&current, &user_data);
    if (on && current != note) {
        previous.callback  = current;
        previous.user_data = user_data;
        sx_fail(SX_OK, "%s", "");
        llama_log_set(note, NULL);
    } else if (!on && current == note) {
        llama_log_set(previous.callback, previous.user_data);
    }
}
