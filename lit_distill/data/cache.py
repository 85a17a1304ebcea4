"""The cache of what was read, tokenised and packed: files named by a hash of everything that their content depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets


def cache_file(fingerprint: str) -> Path:
    """Path of the cached rows with this fingerprint, in the cache folder of ``datasets``."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lit_distill" / f"{fingerprint}.arrow"


def digest(*parts: Any) -> str:
    """32 hex digits: a hash of the parts as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
