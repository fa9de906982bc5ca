"""An OpenAI-compatible HTTP server: llama-cpp-python's, with our `Llama` and strict requests."""
