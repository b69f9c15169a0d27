"""Models of the Hugging Face hub: only weights as safetensors, configs and tokenizers are fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftdyno.engine.errors import UserError
from peftdyno.engine.tokenizer import TOKENIZER_FILES
from peftdyno.engine.weight_files import safetensors_files

CONFIG_PATTERNS = ["config.json", *TOKENIZER_FILES]
PATTERNS = [*CONFIG_PATTERNS, "model*.safetensors", "model.safetensors.index.json"]
TIMEOUT_SECONDS = 10.0


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line that says what to do."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"model '{hub_id}' is not local and huggingface_hub is not installed: pip install 'peftdyno[hf]'"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the client's errors have no common root: HTTP, offline, gated, cache
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model '{hub_id}' is neither local nor could be fetched from the hub: {reason}") from error


def hub_folder(hub_id: str, timeout: float = TIMEOUT_SECONDS) -> tuple[Path, str]:
    """Local folder of a hub model and its revision; downloads it unless it lies whole in the hub's cache."""
    folder = cached_hub_folder(hub_id) or _snapshot(hub_id, PATTERNS, timeout)
    return folder, folder.name


def cached_hub_folder(hub_id: str, revision: str | None = None) -> Path | None:
    """The hub cache's folder of a model if config and all weights are there, else None."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
        safetensors_files(folder)
    except Exception:  # not installed, not cached, or cached in part: all mean that there is nothing to use
        return None
    return folder if (folder / "config.json").exists() else None


def hub_config_folder(hub_id: str) -> Path:
    """Local folder with at least the config of a hub model."""
    return cached_hub_folder(hub_id) or _snapshot(hub_id, CONFIG_PATTERNS, TIMEOUT_SECONDS)


def _snapshot(hub_id: str, patterns: list[str], timeout: float) -> Path:
    with _hub_errors(hub_id):
        from huggingface_hub import snapshot_download

        # An endpoint that does not answer must not be waited for file by file.
        return Path(snapshot_download(hub_id, allow_patterns=patterns, etag_timeout=timeout))


def hub_is_switched_off() -> bool:
    """Whether the environment forbids the hub, by the hub client's own variable."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
