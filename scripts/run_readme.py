"""Run the Python blocks of README.md and docs/using.md as a reader would: outside the checkout, with kvq alone.

`make wheel` runs it on the wheel, in an environment without pytest; tests/docs/test_readme.py uses its parts.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from kvq import KVQ
from kvq.evaluation.embedded_model import EMBEDDED_MODEL_PATH, load_embedded_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/using.md")
"""Pages whose every Python block fills a cache."""
NEW_TOKENS = 40
"""Tokens that are generated where a block says 1,024, which would take too long."""


def find_code(text: str, language: str) -> list[str]:
    """Return the blocks of a document in that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def make_namespace() -> dict[str, Any]:
    """Return the names that the blocks take for granted: `model`, `inputs`, `path` and `prompt`."""
    model, tokenizer = load_embedded_model()
    batch = sample_recall_batch(1, 160, 1, generator=torch.Generator().manual_seed(3))
    prompt = decode_tokens([*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()])
    return {
        "model": model,
        "inputs": tokenizer(prompt, return_tensors="pt"),
        "path": EMBEDDED_MODEL_PATH,
        "prompt": prompt,
    }


def run_block(code: str, namespace: dict[str, Any]) -> KVQ:
    """Run a block on names of its own and return the cache that it filled.

    Raises:
        ValueError: it filled none, or not with what it generated, or nothing was quantized.
    """
    names = dict(namespace)
    exec(code.replace("max_new_tokens=1024", f"max_new_tokens={NEW_TOKENS}"), names)  # noqa: S102  # our own pages
    cache = names["attachment"].cache if "attachment" in names else names.get("cache")
    if not isinstance(cache, KVQ):
        raise ValueError(f"the block left no KVQ behind, but {cache!r}")  # noqa: TRY004  # it is wrong, not mistyped
    prompt = names.get("changed", namespace["inputs"]["input_ids"])  # a block may go on with a prompt of its own
    has_evicted = cache.next_position > cache.get_seq_length()  # then a block goes on with `new` behind the prompt
    expected = prompt.shape[1] + (names["new"].shape[1] if has_evicted else 0) + NEW_TOKENS - 1
    if cache.next_position != expected:
        raise ValueError(f"the cache has seen {cache.next_position} tokens, not {expected}")
    memory = cache.memory()
    if memory.compression <= 2 or not memory.layers[0].key.packed_bytes:
        raise ValueError(f"the cache is {memory.compression:.2f} times smaller than full precision")
    return cache


def list_blocks() -> list[tuple[str, int, str]]:
    """Return (page, number, code) for each Python block of the pages."""
    return [
        (page, number, code)
        for page in PAGES
        for number, code in enumerate(find_code((ROOT / page).read_text(encoding="utf-8"), "python"))
    ]


def main() -> None:
    """Run each block in a fresh folder, for the blocks that write files."""
    import kvq

    blocks = list_blocks()
    if {page for page, _, _ in blocks} != set(PAGES):
        sys.exit(f"one of {PAGES} has no Python block")
    if Path(kvq.__file__).is_relative_to(ROOT / "kvq"):
        sys.exit(f"kvq was imported from the checkout, {kvq.__file__}, not from the installed package")
    namespace = make_namespace()
    for page, number, code in blocks:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            cache = run_block(code, namespace)
            os.chdir(ROOT)
        memory = cache.memory()
        print(f"block {number} of {page}: {cache.get_seq_length()} tokens, {memory.compression:.2f}x smaller")


if __name__ == "__main__":
    main()
