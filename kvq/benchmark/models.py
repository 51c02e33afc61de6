"""The models of the benchmark: a small random Llama, with the same weights at every call, or the user's model."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from kvq.benchmark.contenders import Contender
from kvq.benchmark.setting import Setting, Shape
from kvq.benchmark.trial import ModelTrial

SEED = 0


def build_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return a model of that shape with random weights, ready to generate."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model: PreTrainedModel = LlamaForCausalLM(shape.config())
    return model.to(device, dtype).eval()


class ModelTrials:
    """Puts contenders to work in whole models.

    Args:
        model: the user's model; random ones, of which the latest is kept, unless given.
    """

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        self.model = model
        self._random: dict[tuple[Shape, torch.dtype], PreTrainedModel] = {}

    def __call__(self, contender: Contender, setting: Setting, spare: int) -> ModelTrial:
        """Return the trial of a contender."""
        if self.model is not None:
            return ModelTrial(contender, setting, spare, self.model, reads_prompt=True)
        key = (setting.shape, setting.dtype)
        if key not in self._random:
            self._random = {key: build_model(*key, setting.device)}
        return ModelTrial(contender, setting, spare, self._random[key])
