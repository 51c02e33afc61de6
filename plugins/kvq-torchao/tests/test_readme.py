"""The README's Python runs; kvq's own tests run those of plugins that need no library of a vendor."""

import re
from pathlib import Path

import torch

from kvq.evaluation.embedded_model import load_embedded_model
from kvq.evaluation.recall import decode_tokens, sample_recall_batch

README = Path(__file__).parents[1] / "README.md"


def test_its_python_generates():
    model, tokenizer = load_embedded_model()
    batch = sample_recall_batch(1, 60, 1, generator=torch.Generator().manual_seed(3))
    prompt = decode_tokens([*batch.context[0].tolist(), *batch.questions[0, 0, :2].tolist()])
    names = {"model": model, "inputs": tokenizer(prompt, return_tensors="pt")}
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(block.replace("max_new_tokens=1024", "max_new_tokens=20"), names)  # noqa: S102  # our own document
    assert names["attachment"].cache.memory().packed_bytes > 0
