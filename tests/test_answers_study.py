"""The study of questions about a long document, on a bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from selfextend_gguf.cli import main as sx_gguf
from selfextend_gguf.errors import ConfigError
from selfextend_gguf.models import TINY_MODELS
from selfextend_gguf.studies import answers as study

MODEL = TINY_MODELS[0]
TEXT = (Path(__file__).parent / "data" / "heldout.txt").read_text()
PARAGRAPHS = "\n\n".join(TEXT[begin : begin + 400] for begin in range(0, 4000, 400))


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """Questions, and the document: 900 tokens of it count, for a model trained on fewer."""
    document, questions = tmp_path / "acts.txt", tmp_path / "answers.json"
    document.write_text(f"Front matter.\n\nTHE BOOK\n\n{PARAGRAPHS[:900]}\n\nINDEX\n\n{PARAGRAPHS}")
    facts = [PARAGRAPHS[at : at + 30] for at in (700, 10, 420)]
    entries = [{"question": f"What {i}?", "words": ["and"], "fact": fact} for i, fact in enumerate(facts)]
    about = {"document": "Acts", "begin": "THE BOOK", "end": "INDEX", "questions": entries}
    questions.write_text(json.dumps(about))
    return questions, document


def test_questions_stand_in_the_order_of_their_facts(files):
    text, questions = study.load(*files)
    assert text.startswith("THE BOOK") and text.endswith(PARAGRAPHS[:900].rstrip())
    assert [q.text for q in questions] == ["What 1?", "What 2?", "What 0?"]
    assert [q.third for q in questions] == ["first", "middle", "last"]
    assert all(q.page in text for q in questions)


def test_a_document_of_another_edition_is_refused(files):
    questions, document = files
    document.write_text(document.read_text().replace(PARAGRAPHS[420:450], "something else"))
    with pytest.raises(ConfigError, match="the questions are about Acts"):
        study.load(questions, document)


def test_words_of_an_answer_are_whole_words():
    assert study.holds("In /etc/skel, mode 755.", ["/etc/skel", "755"])
    assert study.holds("It is the BASE-passwd maintainer", ["base-passwd"])
    assert not study.holds("mode 4755", ["755"])
    assert not study.holds("mode 755", ["755", "root"])


def test_methods_are_asked_what_run_asks(files, tmp_path, capsys):
    questions, document = files
    arguments = [str(MODEL), "--document", str(document), "--questions", str(questions), "--threads", "1"]
    arguments += ["--kept", str(tmp_path / "kept.jsonl"), "--out", str(tmp_path)]
    study.main([*arguments, "--methods", "selfextend", "page alone", "truncated"])
    assert capsys.readouterr().out.count("of 3, ") == 3
    written = (tmp_path / "answers.md").read_text()
    assert written.count(" of 3 (") == 3
    study.main([*arguments, "--methods", "selfextend", "page alone", "truncated"])
    assert not capsys.readouterr().out  # nothing is measured twice
    assert (tmp_path / "answers.md").read_text() == written

    text, asked = study.load(questions, document)
    (tmp_path / "part.txt").write_text(text)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    result = next(result for what, result in kept if what["method"] == "selfextend")
    for question, answer in zip(asked, result["answers"], strict=True):
        command = ["run", str(MODEL), "-f", str(tmp_path / "part.txt"), question.text, "--temp", "0"]
        ran = CliRunner().invoke(sx_gguf, [*command, "-n", str(study.ANSWER_TOKENS), "-t", "1"], catch_exceptions=False)
        assert ran.stdout.strip() == answer


def test_truncation_keeps_the_end_within_the_trained_context():
    with study.ModelInfo(MODEL) as info:
        kept = study.latest(info, PARAGRAPHS, 100)
        assert PARAGRAPHS.endswith(kept)
        assert len(info.tokenizer.tokens(kept, begins=False)) == 100


def test_a_part_of_the_text_holds_the_fact_of_its_question(files):
    text, questions = study.load(*files)
    with study.ModelInfo(MODEL) as info:
        parts, placed = study.around(info, text, questions, 300)
        assert [len(info.tokenizer.tokens(part, begins=False)) for part in parts] == [300] * 3
        whole, unmoved = study.around(info, text, questions, 10**6)
    for part, question, fact in zip(parts, placed, (PARAGRAPHS[at : at + 30] for at in (10, 420, 700)), strict=True):
        assert part in text and abs(part.index(fact) - question.place * 300) < 2
    assert [question.third for question in placed] == ["first", "middle", "last"]
    assert whole == [text] * 3
    assert [question.place for question in unmoved] == pytest.approx([q.place for q in questions], abs=0.01)
