"""lm-evaluation-harness on the quantized cache: its model type `kvq`, which needs the extra `eval`.

`kvq` is the model type `hf` with two differences. Each generation gets a fresh quantized cache, as under `kvq.attach`.
And log-likelihoods are read in steps of decode size (`kvq.evaluation.continuations`): `hf` computes them in one
forward, which reads no cache, and quantization would have no effect.

Importing this registers the model type. `python -m kvq.evaluation.harness` is the command line of
lm-evaluation-harness with the type registered, for releases that do not find it by entry point.
"""

from kvq.errors import MissingExtraError

try:
    from kvq.evaluation.harness.model import MODEL_TYPE, KVQHarnessModel
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"the model type of lm-evaluation-harness needs {error.name}, which is not installed; "
        "install the extra `eval`: pip install '.[eval]' in the checkout of kvq"
    ) from error

__all__ = ["MODEL_TYPE", "KVQHarnessModel"]
