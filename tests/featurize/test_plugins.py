"""The packages of docs/encoders.md, an encoder and a codec of one's own, installed as they stand there."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

import featurize as package
from featurize.codecs import registry as codecs
from featurize.encoders import registry as encoders
from nestgen.errors import UserError
from nestgen.recipe.sections import Features
from nestgen.sampling.decoder import load_decoder
from tests.featurize.conftest import Outcome, random_picture

PAGE = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")


def install(title: str, site: Path) -> None:
    """Writes a section's modules and, as an installer does, the metadata of its pyproject.toml to a folder of packages."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    project = tomllib.loads(re.findall(r"```toml\n(.*?)```", section, re.DOTALL)[0])["project"]
    modules = re.findall(r"`(my_\w+\.py)`(?:(?!```).)*?\n```python\n(.*?)```", section, re.DOTALL)
    assert modules
    for name, code in modules:
        (site / name).write_text(code)
    information = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n\n".join(groups))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, on the path for one test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    forget()
    yield folder
    forget()


def forget() -> None:
    for registry in (encoders, codecs):
        registry.kinds.cache_clear()


def test_an_encoder_of_one_s_own(site: Path, tmp_path: Path, featurize: Callable[..., Outcome]) -> None:
    from torchvision.models import convnext_tiny

    install("An encoder of your own", site)
    torch.manual_seed(0)
    weights = tmp_path / "convnext_tiny-983f1562.pth"
    torch.save(convnext_tiny().state_dict(), weights)
    assert re.search(
        r"^convnext +third stage +none +236 bilinear, centre 224 +224 px +14x14x384", featurize("encoders").out, re.M
    )
    outcome = featurize("check-encoder", "convnext", "--weights", weights)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "outputs" in outcome.out and "FAILED" not in outcome.out
    assert "weights x of convnext are not there" in featurize("check-encoder", "convnext", "--weights", "x").err
    assert "known are tiny, mocov3," in (err := featurize("check-encoder", "convnexts").err) and "convnext" in err


def test_a_codec_of_one_s_own_encodes_and_decodes(
    site: Path, tmp_path: Path, featurize: Callable[..., Outcome]
) -> None:
    from diffusers import VQModel

    install("A codec of your own", site)
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = VQModel(block_out_channels=[32, 64], **blocks).eval()
    save_file(model.state_dict(), tmp_path / "vq.safetensors")
    (tmp_path / "pictures").mkdir()
    for index in range(2):
        random_picture(index, 16, 16).save(tmp_path / "pictures" / f"{index}.png")
    outcome = featurize(
        *("extract", f"folder:{tmp_path / 'pictures'}", "--encoder", "pixels", "--levels", "1x1x4", "--workers", 0),
        *("--z0", "vq:16", "--z0-weights", tmp_path / "vq.safetensors", "--out", tmp_path / "stores"),
    )
    assert outcome.code == 0, outcome.err
    z_0 = package.open(tmp_path / "stores")["vq/8x8x3"]
    decode = load_decoder(z_0.attrs["codec"])
    z_BCHW = torch.from_numpy(z_0[:, 0].astype(np.float32)).permute(0, 3, 1, 2)
    images = decode(z_BCHW)
    with torch.inference_mode():
        expected = model.decode(z_BCHW).sample
    np.testing.assert_allclose(images / 127.5 - 1, expected.permute(0, 2, 3, 1).clamp(-1, 1), atol=1 / 127)
    Features(out="stores", z0="vq:16")
    (site / "my_codec-1.0.dist-info" / "entry_points.txt").unlink()
    with pytest.raises(ValidationError, match="should be a codec and the side in pixels"):
        Features(out="stores", z0="vq:16")
    with pytest.raises(UserError, match="no decoder for the codec vq of z_0; install the package that has it"):
        load_decoder(z_0.attrs["codec"])


@pytest.mark.parametrize(
    ("points", "code", "sentence"),
    [
        ("tiny = mine:KIND", "KIND = 1", "The name 'tiny' that the installed package mine gives to one of its"),
        ("x = mine:KIND", "import nothing_like", r"can't be imported \(ModuleNotFoundError: No module named 'nothing_like'"),
        ("x = mine:KIND", "KIND = 1", r"is a int \(mine:KIND\) and must be a featurize.encoders.encoder.Kind"),
    ],
)  # fmt: skip
def test_a_package_that_does_not_work_is_named(
    site: Path,
    featurize: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    points: str,
    code: str,
    sentence: str,
) -> None:
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (site / "mine.py").write_text(code)
    (site / "mine-1.0.dist-info").mkdir()
    (site / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info" / "entry_points.txt").write_text(f"[featurize.encoders]\n{points}\n")
    outcome = featurize("encoders")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert re.search(sentence, outcome.err), outcome.err
