"""Regenerate the parts of README.md and docs/ that come from the code: blocks from `<!-- begin: NAME -->` to its end.

    python scripts/update_pages.py             # write the pages
    python scripts/update_pages.py --check     # exit code 1 if one is not up to date
    python scripts/update_pages.py --measure   # run the demo first

Figures come from committed files in benchmarks/results: those of the demo from demo.json, which `--measure` writes in a
minute or two; quality from `kvq eval`, `make real-targets` and `make real-rounding`; speed from `make bench`. All other
blocks are computed now.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from configuration_tables import render_backends, render_fields, render_layer_fields, render_options
from demo_tables import render_demo, write_demo
from gpu_estimate_tables import render_gpu_estimates
from kernel_build_tables import render_kernel_builds
from markdown_table import table
from method_tables import render_method
from preset_tables import render_front, render_long, render_measured, render_presets, render_real_model
from quality_tables import render_toys
from quality_targets import render_targets
from rounding_tables import render_rounding
from speed_tables import render_speed
from step_tables import render_steps
from tuned_tables import render_tuned

import kvq.testing
from kvq import KVQ, attach
from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import sample_recall_batch

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"

LENGTHS = (200, 500, 1000, 4096, 16384)
"""Tokens at which the block `lengths` measures."""


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        write_demo()
    for page in BLOCKS:
        present = (ROOT / page).read_text(encoding="utf-8")
        wanted = update(page, present)
        if arguments.check and present != wanted:
            sys.exit(f"{page} is not up to date: run make pages")
        if present != wanted:
            (ROOT / page).write_text(wanted, encoding="utf-8")


def update(page: str, text: str) -> str:
    """Return the text of a page with every block replaced.

    Raises:
        ValueError: the page lacks a block, has an unknown one, or one without an end.
    """
    blocks = BLOCKS[page]
    begun = re.findall(r"<!-- begin: (.*?) -->", text)
    if sorted(begun) != sorted(blocks):
        raise ValueError(f"{page} has the blocks {begun}, but needs each of {list(blocks)} once")
    for name, render in blocks.items():
        marked = re.compile(f"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        content = render()
        text, count = marked.subn(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
        if count != 1:
            raise ValueError(f"{page} needs the block {name!r} with its end")
    return text


def render_lengths() -> str:
    """Return how much smaller the caches of `examples/configs` are, by length."""
    rows = []
    for path in sorted(CONFIGS.glob("*.yaml"), reverse=True):
        ratios = [f"{measure_compression(path, length):.2f}x" for length in LENGTHS]
        rows.append((f"`{path.stem}`", *ratios))
    header = ("configuration", *(f"{length:,} tokens" for length in LENGTHS))
    return table(header, rows, right=range(1, len(header)))


def measure_compression(config: Path, length: int) -> float:
    """Return how many times smaller `length` tokens are than in bfloat16, at head_dim 128."""
    states = torch.randn(1, 1, length, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = KVQ(config)
    cache.update(states, states, 0)
    return cache.memory().compression


def render_memory() -> str:
    """Return what `print(cache.memory())` prints after the embedded model has read a context and generated."""
    model, _ = load_embedded_model()
    batch = sample_recall_batch(1, 160, 1, generator=torch.Generator().manual_seed(1))
    with attach(model, layers={"first:1": {"nbits_v": 4}}) as attachment:
        model.generate(batch.context, attention_mask=torch.ones_like(batch.context), max_new_tokens=60)
    lines = [line.rstrip() for line in str(attachment.cache.memory()).splitlines()]
    return "\n".join(["```text", *lines, "```"])


def render_checks() -> str:
    """Return the checks of the contract kit."""
    rows = [(f"`{check.__name__}`", inspect.getdoc(check) or "") for check in kvq.testing.CHECKS]
    return table(("check", "what it requires of a backend"), rows)


BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {"real": render_front},
    "docs/configuration.md": {
        "presets": render_presets,
        "fields": render_fields,
        "layer-fields": render_layer_fields,
        "backends": render_backends,
        "options": render_options,
    },
    "docs/memory.md": {"memory": render_memory, "lengths": render_lengths},
    "docs/method.md": {"method": render_method, "rounding": render_rounding},
    "docs/plugins.md": {"checks": render_checks},
    "docs/quality.md": {
        "real-model": render_real_model,
        "targets": render_targets,
        "long": render_long,
        "demo": render_demo,
        "measured-presets": render_measured,
        "toys": render_toys,
    },
    "docs/tuning.md": {"tuned": render_tuned},
    "docs/speed.md": {
        "steps": render_steps,
        "builds": render_kernel_builds,
        "gpu": render_gpu_estimates,
        "speed": render_speed,
    },
}
"""The generated blocks of each page, and what renders them."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Regenerate the tables of README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is not up to date")
    parser.add_argument("--measure", action="store_true", help="run the demo first")
    return parser.parse_args()


if __name__ == "__main__":
    main()
