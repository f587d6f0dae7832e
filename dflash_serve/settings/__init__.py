"""`args` of serve_config.yaml: what may stand there (`model`), where defaults come from (`profiles`), and what it
becomes for Ray Serve LLM (`translate`)."""

from dflash_serve.settings.model import Settings, SettingsError
from dflash_serve.settings.profiles import Cluster, Resolved, profile_names, resolve
from dflash_serve.settings.translate import check_engine_arguments, llm_config_kwargs

__all__ = [
    "Cluster",
    "Resolved",
    "Settings",
    "SettingsError",
    "check_engine_arguments",
    "llm_config_kwargs",
    "profile_names",
    "resolve",
]
