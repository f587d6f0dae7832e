"""The generated part of k8s/ comes from serve_config.yaml, the profiles and the overlays' settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deployments.app import check
from dflash_serve.kubernetes import serve
from dflash_serve.kubernetes.__main__ import dump, generated, main
from dflash_serve.settings import SettingsError
from tests.unit.kubernetes.rendered import OVERLAYS, ROOT, one, overlay, serve_config

CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
CPU = {"profile": "smollm2-cpu", "hardware": {"cpus_per_replica": 1}}
GEMMA = {"profile": "gemma4-31b-b300", "target_revision": "abc", "drafter_revision": "def"}


@pytest.mark.parametrize("path", sorted(generated(ROOT)), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_committed_file_is_up_to_date(path: Path) -> None:
    assert path.read_text() == generated(ROOT)[path], "python -m dflash_serve.kubernetes"


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_and_we_accept_the_serve_configuration(name: str) -> None:
    config = serve_config(one(overlay(name), "RayService"))
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    # the REST interface that the operator calls ignores names that it does not know
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert config["applications"][0].keys() <= type(application).model_fields.keys()
    assert config["http_options"].keys() <= type(schema.http_options).model_fields.keys()
    settings = check(application.args, http_host=schema.http_options.host).settings
    assert settings.auth.keys_file == serve.KEYS_FILE


@pytest.mark.parametrize("name", OVERLAYS)
def test_it_is_the_repository_s_configuration_with_the_overlay_s_settings(name: str) -> None:
    config = serve_config(one(overlay(name), "RayService"))
    (application,) = config["applications"]
    own = yaml.safe_load((ROOT / "k8s" / "overlays" / name / "settings.yaml").read_text())
    assert application["args"]["profile"] == own["profile"]
    assert application["args"]["autoscaling"] == own["autoscaling"]
    # what an overlay may not change
    changed = copy.deepcopy(config)
    changed["http_options"]["host"] = CONFIG["http_options"]["host"]
    changed["logging_config"]["encoding"] = CONFIG["logging_config"]["encoding"]
    changed["applications"][0]["args"] = CONFIG["applications"][0]["args"]
    assert changed == CONFIG


def test_models_come_from_the_volume_under_their_hub_names() -> None:
    (application,) = serve.serve_config(CONFIG, GEMMA)["applications"]
    assert application["args"] == {
        "profile": "gemma4-31b-b300",
        "model_id": "google/gemma-4-31B-it",
        "target": "/models/google--gemma-4-31B-it/abc",
        "drafter": "/models/z-lab--gemma-4-31B-it-DFlash/def",
        "auth": {"keys_file": serve.KEYS_FILE},
    }
    fetched = ["google/gemma-4-31B-it@abc", "z-lab/gemma-4-31B-it-DFlash@def"]
    assert serve.models_command("fetch", GEMMA)[-3:] == ["/models", *fetched]


def test_a_change_of_the_repository_s_configuration_reaches_the_cluster() -> None:
    config = copy.deepcopy(CONFIG)
    config["applications"][0]["args"]["routing"] = {"policy": "prefix_aware"}
    config["http_options"]["port"] = 8100
    args = {"profile": "smollm2-cpu"}
    found = serve.serve_config(config, args)
    assert found["applications"][0]["args"]["routing"] == {"policy": "prefix_aware"}
    assert found["http_options"] == {"host": "0.0.0.0", "port": 8100}
    assert config["http_options"]["host"] == "127.0.0.1", "the source stays as it was"


def test_without_speculation_no_drafter_is_fetched() -> None:
    args = GEMMA | {"speculation": {"mode": "off"}}
    assert [str(model) for model in serve.models(args)] == ["google/gemma-4-31B-it@abc"]
    assert "drafter" not in serve.serve_config(CONFIG, args)["applications"][0]["args"]


def test_times_follow_the_longest_stream() -> None:
    patch = {
        o["path"]: o["value"]
        for o in serve.overlay_patch(CONFIG, GEMMA | {"limits": {"max_stream_seconds": 100}}, dump)
    }
    assert patch["/spec/rayClusterDeletionDelaySeconds"] == 160
    (grace,) = (value for path, value in patch.items() if path.endswith("terminationGracePeriodSeconds"))
    (drain,) = (value for path, value in patch.items() if path.endswith("preStop/exec/command"))
    assert drain == serve.drain_command(760)
    assert grace == 820


def test_ray_counts_what_one_replica_takes() -> None:
    def counted(**hardware: Any) -> dict[str, str]:
        return serve.ray_start_parameters(serve.settings_of(GEMMA | {"hardware": hardware}))

    kind = {"resources": """'{"accelerator_type:B300": 1}'"""}
    assert counted() == {"num-cpus": "8"} | kind
    assert counted(cpus_per_replica=16.0) == {"num-cpus": "16"} | kind
    assert counted(accelerator="gpu") == {"num-cpus": "8"}, "a GPU of whatever kind has no name"
    assert serve.ray_start_parameters(serve.settings_of(CPU)) == {"num-cpus": "1"}
    with pytest.raises(SettingsError, match=r"hardware\.cpus_per_replica: 0\.5 is not a whole number"):
        serve.ray_start_parameters(serve.settings_of({"profile": "smollm2-cpu"}))


def test_models_that_are_not_pinned_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(CONFIG))
    args = {"profile": "gemma4-31b-b300", "target_revision": "0" * 40, "drafter_revision": "main"}
    for name, own in (("mine", args), ("demo", CPU)):
        folder = tmp_path / "k8s" / "overlays" / name
        folder.mkdir(parents=True)
        (folder / "settings.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "k8s" / "monitoring").mkdir()
    assert main(tmp_path) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: k8s/overlays/mine/settings.yaml: drafter_revision: main is no commit")


def test_a_wrong_setting_names_the_overlay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(CONFIG))
    folder = tmp_path / "k8s" / "overlays" / "mine"
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text("profile: smollm2-cpu\nlimts: {max_n: 2}\n")
    with pytest.raises(SettingsError, match=r"k8s/overlays/mine/settings\.yaml: limts: unknown setting"):
        generated(tmp_path)
    assert main(tmp_path) == 1
    assert "did you mean limits?" in capsys.readouterr().err
