"""OpenAI's client for Node against a server. SX_GGUF_TEST_NODE names a folder where `npm install openai` was typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from served import Served
from test_server_openai import TEMPLATE

from selfextend_gguf.models import TINY_MODEL

PROGRAM = """
import OpenAI from 'openai';
const client = new OpenAI({ baseURL: process.argv[2], apiKey: 'none', maxRetries: 0 });
const asked = { model: (await client.models.list()).data[0].id, temperature: 0, max_tokens: 40 };
const messages = [{ role: 'user', content: 'hello' }];
const said = {};

const answer = await client.chat.completions.create({ ...asked, messages });
said.answer = answer.choices[0].message.content;
said.tokens = answer.usage.completion_tokens;

said.streamed = '';
for await (const chunk of await client.chat.completions.create({ ...asked, messages, stream: true })) {
    said.streamed += chunk.choices[0]?.delta?.content ?? '';
}

const parameters = {
    type: 'object', properties: { hot: { type: 'boolean' } }, required: ['hot'], additionalProperties: false,
};
const tools = [{ type: 'function', function: { name: 'weather', parameters } }];
const runner = client.chat.completions.stream({ ...asked, messages, tools, tool_choice: 'required' });
const call = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0];
said.call = [call.function.name, JSON.parse(call.function.arguments), call.id.length > 0];

const wish = { model: asked.model, input: 'hello', max_output_tokens: 40, temperature: 0 };
const response = await client.responses.create(wish);
said.response = response.output_text;

try {
    await client.chat.completions.create({ ...asked, messages: [{ role: 'user', content: 'x'.repeat(5000) }] });
} catch (error) {
    said.refused = [error.status, error.constructor.name, error.message];
}

const stopped = await client.chat.completions.create({ ...asked, messages, stream: true });
for await (const chunk of stopped) break;
console.log(JSON.stringify(said));
"""


def test_openais_client_for_node(tmp_path):
    node, packages = shutil.which("node"), os.environ.get("SX_GGUF_TEST_NODE")
    if node is None or not packages or not Path(packages, "node_modules", "openai").is_dir():
        pytest.skip("needs node, and SX_GGUF_TEST_NODE with npm's openai")
    (tmp_path / "node_modules").symlink_to(Path(packages, "node_modules").resolve())
    program, template = tmp_path / "program.mjs", tmp_path / "chat.jinja"
    program.write_text(PROGRAM)
    template.write_text(TEMPLATE)
    server = Served(str(TINY_MODEL), "--ctx", "1024", "-t", "1", "--chat-template", str(template))
    try:
        done = subprocess.run([node, program, f"{server.url}/v1"], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        said = json.loads(done.stdout)
        assert said["tokens"] == len(said["answer"]) == 40
        assert said["streamed"] == said["answer"] == said["response"]
        assert said["call"][0] == "weather"
        assert isinstance(said["call"][1]["hot"], bool)
        assert said["call"][2]
        assert said["refused"][:2] == [400, "BadRequestError"]
        assert "5026" in said["refused"][2] or "tokens" in said["refused"][2]
    finally:
        assert server.end()[0] == 0
