"""Keeps the noise that libraries print while they are imported from users who did not ask for it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _NoExtensions(logging.Filter):
    """xformers' report that it has no CUDA extensions for this torch: `attnctrl.attention.available_kernels` tells it instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "can't load C++/CUDA extensions" not in str(record.msg)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences import-time warnings of libraries below us, unless the environment sets ATTNCTRL_VERBOSE."""
    if os.environ.get("ATTNCTRL_VERBOSE"):
        yield
        return
    logger = logging.getLogger("xformers")
    if not any(isinstance(item, _NoExtensions) for item in logger.filters):
        logger.addFilter(_NoExtensions())
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield
