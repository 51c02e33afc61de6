"""The page of the docs that lists the kinds of models and their checks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import transformers
from checks import CROPPED, LEAST_DISTINCT, LEAST_RATIO, NEW_TOKENS, QUANTIZED, Report
from families import PADDING, PROMPT_LENGTH, SLIDING_WINDOW

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

TEXT = f"""# Models

Written by `make models`, which runs the checks below on a tiny random model of each kind. `make test` runs them
too, and fails if this page is wrong. Made with transformers {{version}}.

Every row was checked beside `DynamicCache` with the same model:

- **Exact states**: with a window longer than the text, greedy generation gives the same {NEW_TOKENS} tokens in float32,
  with `KVQ(model=model)`, and attached with one of two prompts padded by {PADDING} tokens on the left. At least
  {LEAST_DISTINCT} of the tokens are different ones.
- **Quantized**: after a prompt of {PROMPT_LENGTH} tokens the logits of the same text stay close at
  {QUANTIZED["nbits_k"]} bits, with and without padding, and differ at least {LEAST_RATIO} times as much at 2 bits.
- **Flushes**: how often the quantized layer that has the fewest moved tokens from its window
  ({QUANTIZED["residual_length"]} tokens here) to the store.
- **Crop**: {CROPPED} tokens are taken back, through the window into the store, and other ones follow. Where all layers
  slide, that is refused unless the past was recorded.
- **Without `model=`**: whether a cache that does not know the model gives the same tokens, or asks for it.
- **Attached**: how layers are read at each step of decoding: packed by a kernel, or dequantized, and why.
- Encoder-decoder models: the same of the decoder, and once more with `cross_attention="quantize"`.

Layers are those of the default configuration in the small model: numbers of layers in front, sliding windows of
{SLIDING_WINDOW} tokens. Layers that are "kept" stay in full precision, as transformers holds them.

| model | class | layers | without `model=` | attached | flushes | crop |
| --- | --- | --- | --- | --- | ---: | --- |
{{rows}}

A model that is not here works in the same way if its layers do: `KVQ(model=model)` takes transformers' own list of
layers and replaces those that hold keys and values. What such a layer holds beside them stays as it is: a state of
linear attention, the keys of an indexer. Layers of other kinds stay as they are too, and if nothing is left to be
quantized (Mamba) `KVQ` says "nothing in this model would be quantized". `attach` refuses a model that generates by a
loop of its own (DiffusionGemma), which takes a `KVQ` as `past_key_values`. Where a model hands keys and values to code
of its own instead of an attention function of transformers, that code gets them in full precision.
"""


def render(reports: Iterable[Report]) -> str:
    """Return the page."""
    return TEXT.format(version=transformers.__version__, rows="\n".join(report.row for report in reports))


def find_version(page: str) -> str:
    """Return the version of transformers that a page was made with."""
    found = re.search(r"Made with transformers (\S+)\.\n", page)
    assert found, "the page names no version"
    return found[1]
