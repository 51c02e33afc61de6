"""From a model and a text to the statistics of its states."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from kvq.attaching.unwrap import unwrap_model
from kvq.calibrating.moments import Moments
from kvq.calibrating.seen_states import EXACT_TOKENS, SeenStates, WatchedCache, queries_seen
from kvq.calibration import Calibration
from kvq.errors import CalibrationError, ModelError
from kvq.persistence.fingerprint import fingerprint_model
from kvq.plugin_api.quantizer import Side
from kvq.plugin_api.statistics import LayerStatistics
from kvq.transformers_seams.private_names import pass_cache
from kvq.watcher import Nobody, Watcher

READING = "reading the text"


def calibrate(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    *,
    text: str = "",
    batch_size: int = 1,
    watcher: Watcher | None = None,
) -> Calibration:
    """Collect the statistics of a model's keys, values and queries, which `rounding_k` and some backends ask for.

    The model reads the text once, in full precision. `Calibration.save` writes them to a file, and `calibration=FILE`
    in a configuration gives them to the backend; a configuration takes the object too.

    Args:
        model: a causal model of transformers; its attention is switched meanwhile.
        sequences: int64 `[N, L]`, without padding; a few thousand tokens are plenty. The first 4 of each sequence are
            not counted: a cache keeps them exact.
        text: name of the text, kept in the file.
        batch_size: sequences that are read together.
        watcher: is told of every batch.

    Raises:
        CalibrationError: the sequences are too short or no tokens of the model, or the states are not finite.
        ModelError: the model is of another kind, or caches no keys and values.
    """
    model = _find_model(model)
    _check_sequences(sequences, getattr(model.get_input_embeddings(), "num_embeddings", None))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise CalibrationError(f"batch_size={batch_size!r} is not accepted; at least 1")
    seen, rows = SeenStates(), sequences.split(batch_size)
    own_watcher = watcher or Nobody()
    own_watcher.begin(READING, len(rows), "batches")
    with torch.inference_mode(), queries_seen(model, seen):
        for some in rows:
            _read(model, some.to(model.device), seen)
            own_watcher.advance(READING)
    if not seen.sides:
        raise ModelError(f"{type(model).__name__} caches no keys and values")
    layers = {place: _finish(place, seen) for place in seen.sides}
    _check_finite(layers)
    tokens = next(iter(seen.sides.values())).count
    return Calibration(layers, model=fingerprint_model(model), text=text, tokens=tokens)


def _find_model(given: object) -> PreTrainedModel:
    model = unwrap_model(given)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a model of transformers")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} has an encoder and a decoder; statistics are of causal models")
    return model


def _check_sequences(sequences: torch.Tensor, known: int | None) -> None:
    if not isinstance(sequences, torch.Tensor) or sequences.dtype not in (torch.int64, torch.int32):
        found = sequences.dtype if isinstance(sequences, torch.Tensor) else type(sequences).__name__
        raise CalibrationError(f"sequences are {found}; a tensor of whole numbers [sequences, tokens] is needed")
    if sequences.dim() != 2 or sequences.shape[1] <= EXACT_TOKENS or not len(sequences):
        raise CalibrationError(
            f"sequences are {list(sequences.shape)}; [sequences, tokens] is needed, each longer than {EXACT_TOKENS}"
        )
    least, most = (int(number) for number in sequences.aminmax())
    if least < 0 or (known is not None and most >= known):
        upper = "" if known is None else f" to {known - 1}"
        raise CalibrationError(f"sequences have tokens from {least} to {most}; the model knows 0{upper}")


def _read(model: PreTrainedModel, tokens: torch.Tensor, seen: SeenStates) -> None:
    body = model.base_model  # without the head, whose logits take more memory than all else
    cache = WatchedCache(model.config, seen)
    body(tokens, use_cache=True, **pass_cache(body, cache))


def _finish(place: tuple[int, Side], seen: SeenStates) -> LayerStatistics:
    layer_idx, side = place
    moments = seen.sides[place]
    queries: Moments | None = seen.queries.get(layer_idx) if side == "key" else None
    if queries is not None and queries.second_moment.shape != moments.second_moment.shape:
        queries = None  # latent attention: the queries that it computes with are of expanded keys
    return moments.to_statistics(queries)


def _check_finite(layers: Mapping[tuple[int, Side], LayerStatistics]) -> None:
    for (layer_idx, side), own in layers.items():
        if not own.second_moment.isfinite().all():
            raise CalibrationError(f"the {side}s of layer {layer_idx} are not finite on this text")
