"""The random model of the benchmark: a small Llama, the same weights at every call."""

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
    """Puts contenders to work in whole models, of which one for each dtype is built and kept."""

    def __init__(self) -> None:
        self._models: dict[tuple[Shape, torch.dtype], PreTrainedModel] = {}

    def __call__(self, contender: Contender, setting: Setting, spare: int) -> ModelTrial:
        """Return the trial of a contender."""
        key = (setting.shape, setting.dtype)
        if key not in self._models:
            self._models = {key: build_model(*key, setting.device)}
        return ModelTrial(contender, setting, spare, self._models[key])
