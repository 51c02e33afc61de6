"""The configuration files that a command names, by the names that its table gives them."""

from __future__ import annotations

from pathlib import Path

from kvq.cli.given_path import find_config_file
from kvq.config import KVQCacheConfig
from kvq.errors import EvaluationError


def read_configs(files: list[Path] | None) -> dict[str, KVQCacheConfig]:
    """Return the configurations by the names of their files, without folder and suffix.

    Raises:
        EvaluationError: two have the same name.
        ConfigError, BackendError: as from `KVQCacheConfig.from_file`.
    """
    configs = {file.stem: KVQCacheConfig.from_file(find_config_file(file)) for file in files or []}
    if len(configs) < len(files or []):
        raise EvaluationError("two configurations have the same file name; rename one, the table needs two names")
    return configs
