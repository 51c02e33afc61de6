"""The command line of lm-evaluation-harness with the model type `kvq` registered.

python -m kvq.evaluation.harness --model kvq --model_args pretrained=MODEL,kvq_config=k4v2.yaml --tasks gsm8k
"""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

from kvq.errors import KVQError


def main() -> None:
    """Run the command line; an error of ours ends it with one line and exit code 1."""
    try:
        cli_evaluate()
    except KVQError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
