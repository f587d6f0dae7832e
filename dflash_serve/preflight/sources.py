"""config.json of a model wherever it lies: bundled, in a folder, on the hub, in a bucket."""

from __future__ import annotations

import json
from typing import Any

from dflash_serve.settings.model import REMOTE
from dflash_serve.settings.profiles import local_config

HUB_SECONDS = 10


class Unavailable(OSError):
    """Whether the model can be had is not known from here; the message says why."""


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json; a bundled target must have been made.

    Raises ValueError, with the mend, when the model cannot be used, and Unavailable when that cannot be told.
    """
    if REMOTE.match(model):
        return _from_bucket(model)
    config = local_config(model)
    if config is not None:
        return config
    if model.startswith(("/", "./", "../", "~")):
        raise Unavailable(f"there is no folder {model} on this machine; it must be on each node that serves")
    return _from_hub(model, revision)


def _from_hub(model: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at {revision}" if revision else ""
    try:
        path = hf_hub_download(model, "config.json", revision=revision, etag_timeout=HUB_SECONDS)
    except HFValidationError:
        raise ValueError(f"{model!r} is neither a folder here nor a hub name; write owner/name or a path") from None
    except GatedRepoError:
        raise ValueError(
            f"{model} is gated; accept its terms at https://huggingface.co/{model}, then set HF_TOKEN of that account "
            "in the environment of every node"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the hub shows no {model}; check the name, and for a private one set HF_TOKEN in the environment of "
            "every node"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{model} has no revision {revision}; name a branch, tag or commit that is there") from None
    except RemoteEntryNotFoundError:
        raise ValueError(f"{model}{at} has no config.json; name a model in Hugging Face's format") from None
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{model}{at} is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set; fetch it where "
                f"there is network (`hf download {model}`), copy the cache to every node, or name a folder"
            ) from None
        raise Unavailable(
            f"the hub does not answer and {model}{at} is not in the cache; on a network without it set "
            "HF_HUB_OFFLINE=1 and fill the cache, or name a folder"
        ) from None
    except OSError as error:
        raise Unavailable(f"the hub does not give {model}{at}: {_first_line(error)}") from None
    with open(path, encoding="utf-8") as file:
        return dict(json.load(file))


def _from_bucket(uri: str) -> dict[str, Any]:
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem

    try:
        files, path = FileSystem.from_uri(f"{uri.rstrip('/')}/config.json")
        with files.open_input_stream(path) as stream:
            return dict(json.loads(stream.read()))
    except FileNotFoundError:
        raise ValueError(f"{uri} has no config.json; name the folder that holds it") from None
    except ArrowInvalid as error:
        raise ValueError(f"{uri}: {_first_line(error)}; use s3://, gs:// or abfss://") from None
    except PermissionError:
        raise ValueError(f"{uri} may not be read; give every node credentials for the bucket") from None
    except OSError as error:
        raise Unavailable(f"{uri} does not answer: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
