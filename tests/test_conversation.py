"""Conversations: what is read, what is kept, what is saved."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing

import gguf
import numpy as np
import pytest
from helpers import CHAT_TEMPLATE, SHAPES

from selfextend_gguf import Llama
from selfextend_gguf.cli.interrupts import deferred_interrupts
from selfextend_gguf.conversation import Conversation
from selfextend_gguf.errors import ContextFullError, ConversationError, PromptCacheError
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.models import TINY_MODEL
from selfextend_gguf.prompt import make_prompt
from selfextend_gguf.tiny import model_file
from selfextend_gguf.tiny.model_file import LlamaShape, byte_characters, random_tensors, write_llama


class Opened:
    """A model, a conversation with it, and the tokens it evaluated."""

    def __init__(self, path, *, n_ctx=1024, **options):
        self.info = ModelInfo(path)
        self.llm = Llama(str(path), n_ctx=n_ctx, verbose=False)
        self.conversation = Conversation(self.llm, self.info, **options)
        self.read = []  # tokens of each evaluation
        evaluate = self.llm.eval

        def counting(tokens):
            self.read.append(len(tokens))
            evaluate(tokens)

        self.llm.eval = counting

    def turn(self, method, *arguments, max_tokens=5, **generation):
        """The answer, and how many tokens were read before it."""
        self.read.clear()
        sampling = {"temperature": 0.0} | generation
        answer = "".join(piece.text for piece in method(*arguments, max_tokens=max_tokens, **sampling))
        return answer, self.read[0]

    def ask(self, text, **generation):
        return self.turn(self.conversation.ask, text, **generation)

    def again(self, **generation):
        return self.turn(self.conversation.ask_again, **generation)

    def close(self):
        self.llm.close()
        self.info.close()


@pytest.fixture(scope="module")
def chat_model(model):
    return model("bundled-chat")


@pytest.fixture
def opened(request):
    """Opens models, which are closed at the end of the test."""

    def make(path, **options):
        one = Opened(path, **options)
        request.addfinalizer(one.close)
        return one

    return make


def cached_text(llm):
    return llm.detokenize(llm.input_ids[: llm.n_tokens].tolist()).decode()


# ---- turns ---------------------------------------------------------------------------------------------------


def test_a_turn_reads_only_what_is_new(chat_model, opened):
    chat = opened(chat_model, system="Be brief.")
    first, n = chat.ask("hello")
    # Bytes are tokens, so numbers of tokens are lengths.
    assert n == len("[system] Be brief.\n[user] hello\n[assistant] ")
    assert len(first) == 5
    _, n = chat.ask("and then?")
    assert n == len(first[-1] + "\n[user] and then?\n[assistant] ")  # the last token of an answer is sampled, not read
    roles = [m["role"] for m in chat.conversation.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert chat.conversation.messages[1]["content"] == first


def test_undo_reads_nothing_again_that_was_kept(chat_model, opened):
    chat = opened(chat_model)
    first, _ = chat.ask("hello")
    second, n_second = chat.ask("and then?")
    assert chat.conversation.undo() == "and then?"
    assert [m["content"] for m in chat.conversation.messages] == ["hello", first]
    # All of the first answer is in the cache by now; of the message taken back, the common beginning.
    other, n = chat.ask("and there?")
    assert n == len("re?\n[assistant] ")
    chat.conversation.undo()
    again, n = chat.ask("and then?")
    assert again == second
    assert n == len("n?\n[assistant] ") < n_second
    chat.conversation.undo()
    chat.conversation.undo()
    with pytest.raises(ConversationError, match="nothing to take back"):
        chat.conversation.undo()
    assert other != ""


def test_another_answer_reads_one_token(chat_model, opened):
    chat = opened(chat_model)
    with pytest.raises(ConversationError, match="no message to answer"):
        chat.again()
    chat.ask("hello")
    first, _ = chat.ask("and then?", max_tokens=20, temperature=1.5)
    second, n = chat.again(max_tokens=20, temperature=1.5)
    assert n == 1  # the last of the prompt, for its logits
    assert first != second
    assert len(chat.conversation.messages) == 4
    assert chat.conversation.messages[-1]["content"] == second


def test_a_system_message_keeps_the_turns(chat_model, opened):
    chat = opened(chat_model)
    chat.ask("hello")
    chat.conversation.system = "Be brief."
    first, n = chat.ask("and then?")
    fresh = opened(chat_model, system="Be brief.")
    fresh.conversation.messages = chat.conversation.messages[:2]
    assert fresh.ask("and then?") == (first, n + 1)  # the bracket at the beginning was in the cache
    chat.conversation.system = None
    _, n = chat.ask("and then?")
    assert n == len(cached_text(chat.llm)) - len("[") - 4  # the whole text but for the common bracket


def test_without_a_template_texts_go_on(opened):
    chat = opened(TINY_MODEL, system="A tale.")
    first, _ = chat.ask("In the beginning")
    second, n = chat.ask(" of it")
    assert cached_text(chat.llm) == "A tale.\n\nIn the beginning" + first + " of it" + second[:-1]
    assert n == len(first[-1] + " of it")


def test_raw_leaves_the_template_out(chat_model, opened):
    chat = opened(chat_model, raw=True)
    _, n = chat.ask("hello")
    assert n == len("hello")


def test_a_template_that_shows_answers_otherwise_is_rendered_anew(tmp_path, model, opened):
    """As those that drop the reasoning of earlier answers do: the prompt before the answer is still not read again."""
    path = tmp_path / "upper.gguf"
    template = (
        "{% for m in messages %}[{{ m.role }}] "
        "{{ m.content | upper if m.role == 'assistant' else m.content }}\n{% endfor %}[assistant] "
    )
    write_llama(path, SHAPES["norm-32"], random_tensors(SHAPES["norm-32"], 1), chat_template=template)
    chat = opened(path, n_ctx=512)
    first, _ = chat.ask("hello", logit_bias=dict.fromkeys(b"abc", 50.0))
    assert set(first) <= set("abc")
    _, n = chat.ask("more", logit_bias=dict.fromkeys(b"abc", 50.0))
    assert n == len(first + "\n[user] more\n[assistant] ")
    assert cached_text(chat.llm).startswith("[user] hello\n[assistant] " + first.upper() + "\n[user] more")


def test_an_answer_that_was_closed_early_is_kept(chat_model, opened):
    chat = opened(chat_model)
    with closing(chat.conversation.ask("hello", max_tokens=50, temperature=0.0)) as pieces:
        text = "".join(next(pieces).text for _ in range(7))
    assert chat.conversation.messages[-1] == {"role": "assistant", "content": text}
    _, n = chat.ask("more")
    assert n == len(text[-1] + "\n[user] more\n[assistant] ")
    assert "[assistant] " + text + "\n[user] more" in cached_text(chat.llm)


def test_a_message_that_does_not_fit_is_not_added(chat_model, opened):
    chat = opened(chat_model)
    first, _ = chat.ask("hello")
    with pytest.raises(ContextFullError, match=r"Requested tokens \(10\d\d\) exceed context window of 1024"):
        chat.ask("x" * 1000)
    assert [m["content"] for m in chat.conversation.messages] == ["hello", first]
    _, n = chat.ask("more")
    assert n == len(first[-1] + "\n[user] more\n[assistant] ")


def test_an_empty_text_is_refused(opened):
    with pytest.raises(ConversationError, match="empty"):
        opened(TINY_MODEL).ask("")


# ---- Ctrl-C --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [256, 1024])
def test_a_decode_aborted_while_reading(heldout_text, model, opened, n_ctx):
    """SIGINT between two steps: llama.cpp gives up the next decode. Within the trained context and beyond."""
    path = model("bundled")  # in F32: with 8-bit weights logits depend on how many tokens are read at once
    text = heldout_text[: n_ctx - 50]
    chat = opened(path, n_ctx=n_ctx)
    chat.llm.n_batch = 64
    reports = []

    def on_read(done, total):
        reports.append((done, total))
        if done >= total // 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), deferred_interrupts(chat.llm):
        chat.ask(text, on_read=on_read)
    done, total = reports[-1]
    assert reports[0] == (0, total) == (0, len(text))
    assert total // 2 <= done < total
    assert chat.llm.n_tokens == len(chat.llm.key_positions) == done
    assert chat.conversation.messages == []

    with deferred_interrupts(chat.llm):
        answer, n = chat.ask(text, max_tokens=20)
    fresh = opened(path, n_ctx=n_ctx)
    assert n == total - done
    assert fresh.ask(text, max_tokens=20) == (answer, total)
    assert np.array_equal(fresh.llm.key_positions, chat.llm.key_positions)


@pytest.mark.parametrize("n_ctx", [256, 1024])
def test_a_decode_aborted_while_generating(heldout_text, model, opened, n_ctx):
    """The text so far is the answer, and the next one is that of a conversation which never had more."""
    path = model("bundled")
    text = heldout_text[: n_ctx - 100]
    chat = opened(path, n_ctx=n_ctx)
    answer = ""
    with pytest.raises(KeyboardInterrupt), deferred_interrupts(chat.llm):
        for piece in chat.conversation.ask(text, max_tokens=50, temperature=0.0):
            answer += piece.text
            if len(answer) == 9:
                os.kill(os.getpid(), signal.SIGINT)
    assert len(answer) == 9
    assert chat.conversation.messages[-1]["content"] == answer

    with deferred_interrupts(chat.llm):
        next_answer, n = chat.ask(" And", max_tokens=20)
    assert n == len(answer[-1] + " And")
    fresh = opened(path, n_ctx=n_ctx)
    assert fresh.ask(text + answer + " And", max_tokens=20)[0] == next_answer
    assert np.array_equal(fresh.llm.key_positions, chat.llm.key_positions)


# ---- vocabularies --------------------------------------------------------------------------------------------


@pytest.fixture
def pair_model(tmp_path, monkeypatch):
    """Random weights and tokens of one and of two letters, so that a sampled text is hardly ever tokenised the same."""

    def add_vocabulary(writer, n_vocab):
        letters = "abcdefghijklmnop"
        pairs = [(a, b) for a in letters for b in letters]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(byte_characters() + [a + b for a, b in pairs])
        writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (n_vocab - 1))
        writer.add_token_merges([f"{a} {b}" for a, b in pairs])
        writer.add_eos_token_id(0)
        writer.add_add_bos_token(False)

    monkeypatch.setattr(model_file, "add_byte_vocabulary", add_vocabulary)
    shape = LlamaShape(n_ctx_train=64, n_layer=2, n_embd=64, n_head=4, n_head_kv=2, head_dim=32, n_ff=96, n_vocab=512)
    path = tmp_path / "pairs.gguf"
    write_llama(path, shape, random_tensors(shape, 1), chat_template=CHAT_TEMPLATE)
    return path


LETTERS = {"logit_bias": dict.fromkeys([*range(97, 113), *range(256, 512)], 30.0), "temperature": 1.0}


def test_the_tokens_of_answers_are_those_that_were_sampled(pair_model, opened, tmp_path):
    chat = opened(pair_model, n_ctx=512)
    chat.ask("hello", max_tokens=30, seed=3, **LETTERS)
    answer_tokens = chat.llm.input_ids[: chat.llm.n_tokens].tolist()[-29:]
    answer = chat.conversation.messages[-1]["content"]
    assert chat.info.tokenizer.tokens(answer, begins=False)[:29] != answer_tokens
    _, n = chat.ask("more", max_tokens=30, seed=4, **LETTERS)
    unread = answer.encode().removeprefix(chat.llm.detokenize(answer_tokens))
    assert n == len(chat.info.tokenizer.tokens(unread.decode() + "\n[user] more\n[assistant] ", begins=False))
    kept = chat.llm.input_ids[: chat.llm.n_tokens].tolist()

    # And they still are after the conversation has been saved and restored, or a turn taken back.
    chat.conversation.save(tmp_path / "c.json")
    chat.conversation.save_cache(tmp_path / "c.kv")
    other = opened(pair_model, n_ctx=512)
    other.conversation.load(tmp_path / "c.json")
    assert other.conversation.load_cache(tmp_path / "c.kv") == len(kept)
    _, n = other.ask("on", **LETTERS)
    assert n <= 1 + len("\n[user] on\n[assistant] ")
    assert other.llm.input_ids[: len(kept)].tolist() == kept
    other.conversation.undo()
    other.conversation.undo()
    other.ask("new", **LETTERS)
    assert other.read[0] <= len("new\n[assistant] ")


def test_text_that_goes_on_gets_no_space_before_it(tmp_path, monkeypatch):
    """SentencePiece vocabularies put a space before what they are given."""

    def add_vocabulary(writer, n_vocab):
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdefgh", "\u2581a"]
        kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
        kinds += [gguf.TokenType.BYTE] * 256
        kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(kinds))
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * len(tokens))
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    monkeypatch.setattr(model_file, "add_byte_vocabulary", add_vocabulary)
    shape = LlamaShape(n_ctx_train=64, n_layer=1, n_embd=64, n_head=2, n_head_kv=2, head_dim=32, n_ff=64, n_vocab=269)
    write_llama(tmp_path / "spm.gguf", shape, random_tensors(shape, 1))
    with ModelInfo(tmp_path / "spm.gguf") as info:
        whole = info.tokenizer.tokens("abcab")
        assert info.tokenizer.tokens("ab")[1:] != whole[-2:]
        assert info.tokenizer.tokens("abc") + info.tokenizer.tokens("ab", begins=False) == whole
        assert info.tokenizer.tokens("\nab", begins=False) == info.tokenizer.tokens("c\nab")[-3:]


def test_a_single_message_is_a_conversation_of_one(chat_model, opened):
    chat = opened(chat_model, system="Be brief.")
    chat.ask("hello", max_tokens=1)
    assert chat.llm.input_ids[: chat.llm.n_tokens].tolist() == make_prompt(chat.info, "hello", "Be brief.").tokens
    raw = opened(chat_model, raw=True)
    raw.ask("hello", max_tokens=1)
    assert raw.llm.input_ids[: raw.llm.n_tokens].tolist() == make_prompt(raw.info, "hello", raw=True).tokens


# ---- files ---------------------------------------------------------------------------------------------------


def test_saved_and_loaded(chat_model, opened, tmp_path):
    chat = opened(chat_model, system="Be brief. Žluťoučký kůň")
    chat.ask("hello")
    chat.ask("and then?")
    path = tmp_path / "c.json"
    chat.conversation.save(path)
    chat.conversation.save_cache(tmp_path / "c.kv")
    content = path.read_text(encoding="utf-8")
    assert json.loads(content) == {"system": chat.conversation.system, "messages": chat.conversation.messages}
    assert "Žluťoučký" in content  # for people to read
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "c.kv"]  # no temporary file is left

    other = opened(chat_model)
    other.conversation.load(path)
    other.conversation.load_cache(tmp_path / "c.kv")
    assert other.conversation.system == chat.conversation.system
    assert other.conversation.messages == chat.conversation.messages
    answer = chat.ask("go on", max_tokens=20)
    assert other.ask("go on", max_tokens=20) == answer
    assert answer[1] == len("\n[user] go on\n[assistant] ") + 1
    assert np.array_equal(chat.llm.key_positions, other.llm.key_positions)


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_without_its_cache_a_conversation_is_read_again(chat_model, opened, tmp_path, content):
    chat = opened(chat_model)
    chat.ask("hello")
    chat.conversation.save(tmp_path / "c.json")
    if content is not None:
        (tmp_path / "c.kv").write_bytes(content)
    other = opened(chat_model)
    other.ask("something else")
    other.conversation.load(tmp_path / "c.json")
    with pytest.raises(FileNotFoundError if content is None else PromptCacheError):
        other.conversation.load_cache(tmp_path / "c.kv")
    answer, n = other.ask("go on", max_tokens=20)
    assert n > len("hello\n[assistant] ")
    assert chat.ask("go on", max_tokens=20)[0] == answer


def test_the_cache_of_another_conversation_does_no_harm(chat_model, opened, tmp_path):
    chat = opened(chat_model)
    first, _ = chat.ask("hello")
    chat.conversation.save(tmp_path / "c.json")
    chat.conversation.clear()
    chat.ask("hello there, this is another one")
    chat.conversation.save_cache(tmp_path / "c.kv")
    other = opened(chat_model)
    other.conversation.load(tmp_path / "c.json")
    other.conversation.load_cache(tmp_path / "c.kv")
    other.ask("go on")
    assert cached_text(other.llm).startswith("[user] hello\n[assistant] " + first + "\n[user] go on\n")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe\xff", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "there is no list of messages"),
        (b'{"messages": {}}', "there is no list of messages"),
        (b'{"messages": ["hello"]}', "message 1 is no text of role user"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "message 1 is no text of role user"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "message 1 is no text of role user"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 1 is no text of role user"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "the last message has no answer"),
        (b'{"messages": [], "system": 7}', "the system message is no text"),
    ],
)
def test_a_file_that_is_no_conversation_changes_nothing(chat_model, opened, tmp_path, content, fault):
    chat = opened(chat_model)
    chat.ask("hello", max_tokens=1)
    before = list(chat.conversation.messages)
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ConversationError, match=f"bad.json is no saved conversation: .*{fault}"):
        chat.conversation.load(path)
    assert chat.conversation.messages == before


def test_a_failed_save_leaves_the_old_file(chat_model, opened, tmp_path, monkeypatch):
    chat = opened(chat_model)
    path = tmp_path / "c.json"
    chat.conversation.save(path)
    before = path.read_bytes()
    chat.ask("hello", max_tokens=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/c\.json'"):
        chat.conversation.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(FileNotFoundError, match=r"missing/c\.json'"):
        chat.conversation.save(tmp_path / "missing" / "c.json")
