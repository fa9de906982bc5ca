"""A group size for each range of RoPE frequencies, in the float64 reference. Writes docs/per-dimension.md.

    python -m selfextend_gguf.studies.per_dimension MODEL.gguf --text book.txt --pretend 512 --kept kept.jsonl

DPE (arXiv 2504.18857) groups the positions of each eighth of the RoPE dimensions by a size of its own, for the fast
ones have turned through all their angles within the trained context, the slow ones have not. Here the schedule
`selfextend` gets such sizes: the boundary, the window and the rest are those of its automatic parameters.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selfextend_gguf._native import schedule_step
from selfextend_gguf.evaluation.kept import Kept
from selfextend_gguf.evaluation.perplexity import perplexity_ratio
from selfextend_gguf.evaluation.readers import Losses, token_losses
from selfextend_gguf.model_info import ModelInfo
from selfextend_gguf.planning import plan
from selfextend_gguf.reference import Reference
from selfextend_gguf.schedule import RULES, SelfExtendConfig

PLAIN, UNIFORM = "plain", "one size (selfextend)"


def sizes(group_size: int) -> dict[str, tuple[int, ...]]:
    """Group sizes of the eighths of the frequencies, from fast to slow, by name; `group_size` is the automatic one."""
    g, half = group_size, max(1, group_size // 2)
    return {
        UNIFORM: (g,) * 8,
        "DPE's for Llama 3 8B": (2, 8, 2, 8, 32, 32, 32, 4),
        "the fast half by half": (half,) * 4 + (g,) * 4,
        "the fastest quarter exact": (1,) * 2 + (g,) * 6,
        "the slow half by twice": (g,) * 4 + (2 * g,) * 4,
    }


def positions(
    config: SelfExtendConfig, group_sizes: Sequence[int], n_frequencies: int, n_cached: int, n_total: int
) -> npt.NDArray[np.int32]:
    """Key positions (n_cached, n_frequencies), the frequencies in as many equal ranges as there are group sizes."""
    rule, stage = RULES[config.schedule], 0
    if n_total > config.n_ctx_train:
        stage = rule.stage(config, n_cached, n_total)
    by_size = {size: rule.positions(replace(config, group_size=size), stage, n_cached) for size in set(group_sizes)}
    return np.stack([by_size[group_sizes[i * len(group_sizes) // n_frequencies]] for i in range(n_frequencies)], 1)


def losses(
    reference: Reference, tokens: Sequence[int], config: SelfExtendConfig, group_sizes: Sequence[int] | None
) -> Losses:
    """Negative log-likelihoods (nats) of tokens[1:]; without group sizes those of plain reading."""
    steps: list[int] = []
    while sum(steps) < len(tokens):
        steps.append(min(512, schedule_step(config, sum(steps), len(tokens) - sum(steps))))
    if group_sizes is None:
        logits = reference.logits(tokens, steps, lambda n_cached, _: np.arange(n_cached, dtype=np.int32))
    else:
        logits = reference.logits(tokens, steps, partial(positions, config, group_sizes, len(reference.frequency)))
    return token_losses(logits[:-1], tokens[1:])


HEAD = """# A group size for each range of RoPE frequencies

Written{machine} by

```sh
python -m selfextend_gguf.studies.per_dimension {command}
```

{model} in the float64 reference, read as if it were trained on {n_ctx_train} tokens: {n_tokens} tokens each of
{texts}.

Group sizes are those of eighths of the frequencies, from fast to slow, in the place of the one of the automatic
parameters. Perplexity is that of the tokens beyond {n_ctx_train}, in relation to plain reading of the same file, which
was trained on more, and to one size for all. Standard errors are those of paired losses.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="GGUF file that the reference knows")
    parser.add_argument("--text", nargs="+", required=True, type=Path, help="UTF-8 texts")
    parser.add_argument("--pretend", type=int, default=512, help="trained context to pretend, in tokens")
    parser.add_argument("--times", type=int, default=4, help="text length in trained contexts")
    parser.add_argument(
        "--kept", type=Path, required=True, help="file that keeps results; those in it are not repeated"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of per-dimension.md")
    parser.add_argument("--machine", default="", help="what it was measured on, for the document")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)  # now, and not after hours
    kept = Kept(args.kept)
    n_tokens = args.times * args.pretend
    config = plan(args.pretend, n_tokens)
    with ModelInfo(args.model) as info:
        tokens = [info.tokenizer.tokens(text.read_text(encoding="utf-8-sig"))[:n_tokens] for text in args.text]
    reference: Reference | None = None
    measured: dict[str, list[Losses]] = {}
    for text, its_tokens in zip(args.text, tokens, strict=True):
        for name, group_sizes in [(PLAIN, None), *sizes(config.group_size).items()]:
            what = {
                "model": args.model.name,
                "bytes": args.model.stat().st_size,
                "tokens": zlib.crc32(np.array(its_tokens, np.int32).tobytes()),
                "config": str(config),
                "sizes": group_sizes,
            }
            if not kept.has(what):
                reference = reference or Reference(args.model)
                its_losses = losses(reference, its_tokens, config, group_sizes)
                kept.measured(what, partial(np.round(its_losses, 5).tolist))
                print(text.name, name, np.exp(its_losses[args.pretend :].mean()))
                sys.stdout.flush()
            measured.setdefault(name, []).append(np.array(kept.get(what))[args.pretend - 1 :])
    joined = {name: np.concatenate(parts) for name, parts in measured.items()}
    rows = ["| group sizes | | perplexity | against one size |", "|---|---|---:|---:|"]
    for name, of_it in joined.items():
        ratio = "(measure)" if name == PLAIN else str(perplexity_ratio(of_it, joined[PLAIN]))
        against = "" if name == UNIFORM else str(perplexity_ratio(of_it, joined[UNIFORM]))
        spelled = "" if name == PLAIN else ", ".join(map(str, sizes(config.group_size)[name]))
        rows.append(f"| {name} | {spelled} | {ratio} | {against} |")
    command = (
        f"{args.model.name} --text {' '.join(text.name for text in args.text)} "
        f"--pretend {args.pretend} --times {args.times} --kept {args.kept.name}"
    )
    head = HEAD.format(
        machine=f" on {args.machine}" if args.machine else "",
        command=command,
        model=args.model.stem,
        n_ctx_train=args.pretend,
        n_tokens=n_tokens,
        texts=", ".join(text.name for text in args.text),
    )
    (args.out / "per-dimension.md").write_text(head + "\n" + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
