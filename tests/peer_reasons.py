"""Why tests of llama-server's fail here: by file, where all of it speaks of something else, or by names' beginnings."""

_WORDS = "looks for words that stories260K says, or counts its tokens"
_DOWNLOAD = "needs a model that has to be downloaded"
_SEED = "the server was started with `--seed` or `--temp`, which are each request's own here"
_VERBOSE = "looks into `__verbose`, llama-server's own record for debugging"
_KEY = "the error is of OpenAI's type, `invalid_request_error`, with the code `invalid_api_key`"
_CORS = "by default every page may use llama-server; here those of this machine, and of `--cors-origins`"
_SLOTS = "asks for `/slots`: there are none, requests take turns"
_POST = "`post_sampling_probs`: probabilities are the model's, before any sampler"
_PRINT = "`system_fingerprint` begins with the build number of llama-server"
_FIRST = 'the first delta holds `content: ""`, as OpenAI\'s does'
_NO_TOOLS = "tools, with a template that says nothing of them: refused with 400"
_REAL = "asks what large models answer, which have to be downloaded; some with templates that say nothing of tools"
_MEDIA = "images"

REASONS = {
    "test_compat_gcp.py": "Google Cloud's own form of requests",
    "test_ctx_shift.py": "a context is never shifted here: it is extended, and what is too long is refused",
    "test_embedding.py": "embeddings",
    "test_infill.py": "infill",
    "test_kv_keep_only_active.py": "reads llama-server's log about its slots",
    "test_lora.py": "needs an adapter that has to be downloaded",
    "test_mcp_servers.py": "MCP servers, which llama-server starts",
    "test_proxy.py": "a proxy for MCP servers",
    "test_rerank.py": "reranking",
    "test_router.py": "a process for each model, downloads, presets; here one model at a time is loaded",
    "test_sleep.py": "a server that unloads its model when idle",
    "test_slot_save.py": "files of slots; here `--prompt-cache` keeps prompts",
    "test_speculative.py": "needs a draft model that has to be downloaded",
    "test_tools_builtin.py": "tools that llama-server runs itself, on files of its machine",
    "test_vision_api.py": _MEDIA,
    "test_basic.py::test_load_split_model": _DOWNLOAD,
    "test_basic.py::test_no_ui": "`--no-ui`: the page is always there",
    "test_basic.py::test_server_model_aliases_and_tags": "several names for one model, and tags",
    "test_basic.py::test_server_multiple_addresses": "several addresses to listen on",
    "test_basic.py::test_server_props": "expects as many slots as it asked for",
    "test_basic.py::test_server_slots": _SLOTS,
    "test_chat_completion.py::test_apply_chat_template": "names a template that is built into llama.cpp",
    "test_chat_completion.py::test_chat_completion[None-Book": _PRINT,
    "test_chat_completion.py::test_chat_completion[codellama": _PRINT,
    "test_chat_completion.py::test_chat_completion_cached_tokens": _WORDS,
    "test_chat_completion.py::test_chat_completion_stream": _FIRST,
    "test_chat_completion.py::test_chat_completion_with_timings": _FIRST,
    "test_chat_completion.py::test_chat_completion_with_openai": _WORDS,
    "test_chat_completion.py::test_chat_template": _VERBOSE,
    "test_chat_completion.py::test_verbose_debug": _VERBOSE,
    "test_chat_completion.py::test_completion_with_response_format": "`items` is a list, as once in JSON Schema",
    "test_chat_completion.py::test_context_size": "the error is of OpenAI's type and code (`context_length_exceeded`)",
    "test_chat_completion.py::test_invalid_chat": "two answers in a row are no error here",
    "test_chat_completion.py::test_return_progress": "counts chunks of a prompt that is split into other tokens",
    "test_chat_completion.py::test_logprobs": _WORDS,
    "test_compat_anthropic.py::test_anthropic_thinking_with": _DOWNLOAD,
    "test_compat_anthropic.py::test_anthropic_vision": _MEDIA,
    "test_compat_anthropic.py::test_anthropic_tool_result_with_image": _MEDIA + ": refused with 400, not 500",
    "test_compat_anthropic.py::test_anthropic_empty": "no messages are an error, as with Anthropic",
    "test_compat_anthropic.py::test_anthropic_streaming_content": _NO_TOOLS,
    "test_compat_anthropic.py::test_anthropic_tool": _NO_TOOLS,
    "test_compat_oai_responses.py": _WORDS,
    "test_template.py::test_reasoning[deepseek": _NO_TOOLS,
    "test_tokenize.py": "expects BOS, which the bundled model lacks",
    "test_completion.py::test_cancel_request": _SLOTS,
    "test_completion.py::test_completion[": _WORDS,
    "test_completion.py::test_completion_stream[": _WORDS,
    "test_completion.py::test_completion_prompt_cache": _WORDS,
    "test_completion.py::test_completion_response_fields": "`prompt` holds BOS, which the bundled model lacks",
    "test_completion.py::test_completion_stream_vs": _SEED,
    "test_completion.py::test_completion_with_tokens": _SEED,
    "test_completion.py::test_completion_with_openai": _PRINT,
    "test_completion.py::test_completion_stream_with_openai": _WORDS,
    "test_completion.py::test_n_probs_post": _POST,
    "test_ignore_eos.py": "looks into `generation_settings` for llama-server's own list of biases",
    "test_metrics.py": "names of metrics and a header that are llama-server's own, embeddings, `/slots`",
    "test_tool_call.py::test_completion_with_required_tool_real": _REAL,
    "test_tool_call.py::test_completion_without": _FIRST,
    "test_tool_call.py::test_calc_result": _REAL,
    "test_tool_call.py::test_hello_world": _REAL,
    "test_tool_call.py::test_thoughts": _REAL,
    "test_tool_call.py::test_weather": _REAL,
    "test_security.py::test_access_static": "files of llama-server's own page",
    "test_security.py::test_cors_options": _CORS,
    "test_security.py::test_cors_origins_defaults": _CORS,
    "test_security.py::test_cors_origins_localhost_reflects": "asks for a header by upper case; ours are in lower case",
    "test_security.py::test_cors_origins_localhost_rejects": "a preflight that is refused is a 400 here",
    "test_security.py::test_cors_proxy": "a proxy for MCP servers",
    "test_security.py::test_incorrect_api_key": _KEY,
    "test_security.py::test_local_media": _MEDIA,
    "test_stream.py": "streams that are taken up again after a connection was lost",
}
