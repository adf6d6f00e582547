"""Exported hierarchies by name: those that ship, and repositories of the Hugging Face Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nestgen import NestedPipeline
from nestgen.errors import UserError
from nestgen.sharing import names
from tests.nestgen.sharing.test_export import Trained, fails, make_run, nestgen


def test_shipped_hierarchies_and_the_hub(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    download_as_the_hub_does = huggingface_hub.snapshot_download
    pipe = NestedPipeline.from_run(make_run(trained, tmp_path))
    hub: dict[str, Any] = {}

    class Api:
        def __init__(self, token: object = None) -> None:
            hub["token"] = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> None:
            hub["made"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: str) -> str:
            hub["deleted"] = delete_patterns  # what an earlier upload had and this one has not
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)
            return f"https://huggingface.co/{repo_id}"

    def download(repo_id: str, allow_patterns: list[str], revision: str | None = None) -> str:
        if not (tmp_path / "hub" / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection to the Hub.\nmore")
        return str(tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert pipe.push_to_hub("someone/toy", private=True, token="t") == "https://huggingface.co/someone/toy"
    assert hub == {"token": "t", "made": ("someone/toy", True, True), "deleted": "*"}
    expected = pipe(num_images=2).latents[0]
    found = NestedPipeline.from_pretrained("someone/toy", revision="main")(num_images=2).latents[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(
        UserError, match=r"someone/other .* cannot be downloaded .* \(no connection to the Hub\); check the name"
    ):
        NestedPipeline.from_pretrained("someone/other")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download_as_the_hub_does)
    with pytest.raises(UserError, match="models/demo--v2 is no folder here and cannot be downloaded"):
        NestedPipeline.from_pretrained("models/demo--v2")  # a mistyped path that no repository can have
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    monkeypatch.setattr(names, "SHIPPED", tmp_path / "hub" / "someone")
    assert names.shipped() == ["toy"]
    torch.testing.assert_close(NestedPipeline.from_pretrained("toy")(num_images=2).latents[0], expected, rtol=0, atol=0)
    nestgen("sample", "--pretrained", "toy", "--count", 2, "--out", tmp_path / "s")
    monkeypatch.chdir(tmp_path)
    nestgen("sample", "--pretrained", "toy", "--count", 1, "--out", "toy")  # samples of that name don't hide it
    assert names.find_pretrained("toy") == tmp_path / "hub" / "someone" / "toy"
    assert "there is no exported hierarchy scene: it is no folder, and the package ships toy" in fails(
        "sample", "--pretrained", "scene", "--count", 2, "--out", tmp_path / "x"
    )
