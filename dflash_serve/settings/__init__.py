"""`args` of serve_config.yaml: what may stand there (`model`), what is wrong with it (`parse`), where defaults come
from (`profiles`), what it becomes for Ray Serve LLM (`translate`), and its documentation (`reference`)."""

from dflash_serve.hardware import Cluster
from dflash_serve.settings.model import Settings
from dflash_serve.settings.parse import SettingsError
from dflash_serve.settings.profiles import Resolved, profile_names, resolve
from dflash_serve.settings.translate import check_engine_arguments, check_speculation_options, llm_config_kwargs

__all__ = [
    "Cluster",
    "Resolved",
    "Settings",
    "SettingsError",
    "check_engine_arguments",
    "check_speculation_options",
    "llm_config_kwargs",
    "profile_names",
    "resolve",
]
