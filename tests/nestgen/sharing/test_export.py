"""An exported folder: the same images for the same seeds without run and stores, and nothing of the machine that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from nestgen import NestedPipeline
from nestgen.cli.main import main
from nestgen.errors import UserError
from nestgen.files import read_json, write_json
from nestgen.images import read_images
from nestgen.recipe.recipe import load_recipe
from nestgen.sampling.conditions import Request
from nestgen.sampling.sample import sample
from nestgen.sharing.portable import portable
from tests.nestgen.captions import Writer, stand_in, write_text

Trained = Callable[..., Path]


def make_run(trained: Trained, tmp_path: Path, **settings: Any) -> Path:
    """A trained run with its stores, as training leaves it."""
    recipe = load_recipe(trained(sampling={"steps": 3}, **settings))
    for folder in (tmp_path / "runs" / "toy").iterdir():
        shutil.copy(recipe.file, folder / "recipe.yaml")
    return tmp_path / "runs" / "toy"


def nestgen(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(*arguments: object, code: int = 1) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stderr


def test_samples_the_same_images_elsewhere(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(trained, tmp_path, classes=3, denoiser={"size": "nano", "labels": 3, "gaussian": True})
    monkeypatch.chdir(tmp_path)
    nestgen("sample", "--count", 5, "--seed", 2, "--out", "before")
    out = nestgen("export", run, "--out", tmp_path / "model")
    assert "3 level(s)" in out
    for name in ("runs", "stores", "nested.yaml"):
        (shutil.rmtree if (tmp_path / name).is_dir() else Path.unlink)(tmp_path / name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "model", elsewhere / "copy")
    monkeypatch.chdir(elsewhere)
    nestgen("sample", "--pretrained", "copy", "--count", 5, "--seed", 2, "--out", "s")
    np.testing.assert_array_equal(read_images(tmp_path / "before", 5), read_images(elsewhere / "s", 5))
    assert read_json(tmp_path / "before" / "sample.json") == read_json(elsewhere / "s" / "sample.json")
    pipe = NestedPipeline.from_pretrained("copy")
    np.testing.assert_array_equal(np.stack(pipe(num_images=5, seed=2).images), read_images(elsewhere / "s", 5))
    nestgen("sample", "--pretrained", "copy", "--count", 4, "--out", "two", "--processes", 2, "--set", "steps=2")
    assert read_json(elsewhere / "two" / "sample.json")["levels"][0]["steps"] == 2
    assert "--pretrained excludes" in fails("sample", "--pretrained", "copy", "--depth", 1, "--out", "x", code=2)
    assert "--pretrained excludes --over-depth" in fails("hierarchy", "--pretrained", "copy", "--over-depth", code=2)
    for command in (
        ("sample", "--like", 3, "--out", "x"),
        ("hierarchy", "--interpolate", 1, 2),
        ("decode", "--out", "x"),
    ):
        assert "has no rows: give --store ROOT" in fails(*command, "--pretrained", "copy", code=2)
    assert not (elsewhere / "x").exists()


def test_holds_statistics_recipe_and_names_but_no_path_of_this_machine(trained: Trained, tmp_path: Path) -> None:
    run = make_run(trained, tmp_path, classes=2, denoiser={"size": "nano", "labels": 2})
    for level, shape in ((1, "4x4x6"), (2, "2x2x4")):
        file = tmp_path / "stores" / "toy" / "tiny" / f"{shape}.zarr" / "zarr.json"
        document = json.loads(file.read_text())
        channels = int(shape.split("x")[2])
        document["attributes"] |= {"mean": [0.25 * level] * channels, "std": [2.0] * channels}
        file.write_text(json.dumps(document))
    z_0 = tmp_path / "stores" / "toy" / "pixels" / "8x8x3.zarr" / "zarr.json"
    document = json.loads(z_0.read_text())
    document["attributes"]["source"] = f"folder:{tmp_path}/photographs"
    z_0.write_text(json.dumps(document))
    labels = tmp_path / "stores" / "toy" / "labels.zarr" / "zarr.json"
    document = json.loads(labels.read_text())
    document["attributes"]["classes"] = ["cat", "dog"]
    labels.write_text(json.dumps(document))
    own = NestedPipeline.from_run(run)
    torch.testing.assert_close(own(label="dog").latents[0], own(label=1).latents[0], rtol=0, atol=0)
    own.save_pretrained(tmp_path / "own")
    assert read_json(tmp_path / "own" / "config.json")["class_names"] == ["cat", "dog"]
    (tmp_path / "names.txt").write_text("golden retriever\nhot air balloon\n")
    card = {"scores": [{"space": "z_0", "frechet_distance": 1.5, "samples": 10}], "samples": {"path": str(tmp_path)}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    arguments = ("--class-names", tmp_path / "names.txt", "--scores", tmp_path / "card.json")
    nestgen("export", run, "--out", tmp_path / "model", *arguments)
    config = read_json(tmp_path / "model" / "config.json")
    assert config["levels"][2]["statistics"] == {"mean": [0.5] * 4, "std": [2.0] * 4}
    assert config["recipe"]["levels"][1]["sigma"] == 0.5
    assert config["data"] == {"source": "folder:photographs", "rows": 40, "views": 1, "encoder": "tiny"}
    for file in (tmp_path / "model").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file
            assert file.stat().st_mode & 0o044 == 0o044, f"{file} is readable by its owner only"
    text = (tmp_path / "model" / "README.md").read_text()
    for sentence in (
        "8x8 pixels",
        "one of 2 classes",
        "40 images of `folder:photographs`",
        "| z_0 | 1.5 |",
        "It takes no text",
    ):
        assert sentence in text
    pipe = NestedPipeline.from_pretrained(tmp_path / "model")
    by_name = pipe(label="hot air balloon").latents[0]
    torch.testing.assert_close(by_name, pipe(label=1).latents[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="no class named 'cat'; the names are golden retriever, hot air balloon"):
        pipe(label="cat")
    sample_ = ("sample", "--pretrained", tmp_path / "model", "--count", 1, "--out", tmp_path / "s", "--label")
    assert "--label: there is no class named 'cat'; the names are golden retriever" in fails(*sample_, "cat")
    nestgen(*sample_, "hot air balloon")
    assert read_json(tmp_path / "s" / "sample.json")["label"] == 1
    (tmp_path / "names.txt").write_text("one\n")
    assert "there are 1 class names, but the denoisers know 2" in fails(
        "export", run, "--out", tmp_path / "other", "--class-names", tmp_path / "names.txt"
    )
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".other*"))


def test_a_model_of_captions_keeps_its_empty_one_and_embeds_prompts(
    trained: Trained, tmp_path: Path, store_writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "stores" / "toy", store_writer, [1] * 40)
    run = make_run(trained, tmp_path, denoiser={"size": "nano", "text": "3x8"})
    pipe = NestedPipeline.from_run(run)
    expected = pipe(prompts=tmp_path / "stores" / "toy", num_images=3).latents[0]
    pipe.save_pretrained(tmp_path / "model")
    assert "a caption" in (tmp_path / "model" / "README.md").read_text()
    write_text(tmp_path / "elsewhere", store_writer, count=2)
    stand_in(
        tmp_path,
        monkeypatch,
        "import shutil, sys\n"
        "assert open(sys.argv[3]).read() == 'a red ball\\na cat\\n', open(sys.argv[3]).read()\n"
        f"shutil.copytree({str(tmp_path / 'elsewhere' / 'text')!r}, sys.argv[5] + '/text')\n",
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    again = NestedPipeline.from_pretrained(tmp_path / "model")
    found = again(prompts=tmp_path / "stores" / "toy", num_images=3).latents[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    by_prompt = again(["a red\nball", "a cat"])
    assert by_prompt.indices == (0, 1)
    loose = again(prompts=tmp_path / "elsewhere", num_images=2).latents[0]
    torch.testing.assert_close(by_prompt.latents[0], loose, rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before  # it may be read-only
    assert list((tmp_path / "cache" / "nestgen" / "prompts").iterdir())


def test_exported_again_it_is_the_same(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into another folder, into its own, and through a link to it."""
    pipe = NestedPipeline.from_run(make_run(trained, tmp_path))
    pipe.save_pretrained(tmp_path / "a")
    NestedPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["README.md", "config.json", "z0.safetensors", "z1.safetensors", "z2.safetensors"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    for out in (".", tmp_path / "link"):
        pipe.save_pretrained(out)
        assert sorted(path.name for path in (tmp_path / "b").iterdir()) == files
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))


def test_a_recipe_without_a_name_is_called_as_its_run(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run its file is recipe.yaml, which is no name."""
    trained(sampling={"steps": 1})
    file = tmp_path / "nested.yaml"
    file.write_text(file.read_text().replace("name: toy\n", ""))
    file = file.rename(tmp_path / "toy.yaml")
    for folder in (tmp_path / "runs" / "toy").iterdir():
        shutil.copy(file, folder / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    nestgen("export", "runs/toy", "--out", "model")
    assert "\n# toy\n" in Path("model/README.md").read_text()
    nestgen("sample", "--pretrained", "model", "--count", 3, "--out", "s")
    nestgen("evaluate", "--samples", "s", "--recipe", file)


def test_half_precision_is_half_the_size_and_near(trained: Trained, tmp_path: Path) -> None:
    run = make_run(trained, tmp_path)
    nestgen("export", run, "--out", tmp_path / "half", "--dtype", "float16", "--depth", 2)
    pipe = NestedPipeline.from_run(run, depth=2)
    half = NestedPipeline.from_pretrained(tmp_path / "half")
    assert len(half.samplers) == 2
    assert load_file(tmp_path / "half" / "z0.safetensors")["norm.weight"].dtype == torch.float16
    assert half.samplers[0].trained.denoiser.norm.weight.dtype == torch.float32
    one, other = pipe(num_images=3).latents[0], half(num_images=3).latents[0]
    assert 0 < float((one - other).abs().max()) < 0.01 * float(one.std())


def test_the_weak_denoiser_of_autoguidance_goes_along(trained: Trained, tmp_path: Path) -> None:
    from nestgen.runs.checkpoint import newest, save_checkpoint

    run = make_run(trained, tmp_path)
    checkpoint = newest(run / "z2-top")
    assert checkpoint is not None
    weak = {name: 0.9 * value for name, value in checkpoint.load("ema").items()}
    save_checkpoint(run.parent / "weak" / "z2-top", {"ema": weak}, checkpoint.meta, keep=1)
    recipe = load_recipe(tmp_path / "nested.yaml").with_sampling(
        {"steps": 3, "autoguide": [None, None, {"scale": 0.5, "run": "weak"}]}
    )
    sample(recipe, tmp_path / "s", Request(3, 0, 3))
    document = f"{(tmp_path / 'nested.yaml').read_text()}"
    for folder in run.iterdir():
        text = document.replace("sampling:\n", "sampling:\n  autoguide: [null, null, {scale: 0.5, run: weak}]\n")
        (folder / "recipe.yaml").write_text(text)
    NestedPipeline.from_run(run).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "z2-weak.safetensors").is_file()
    shutil.rmtree(tmp_path / "runs")
    again = NestedPipeline.from_pretrained(tmp_path / "model")(num_images=3)
    np.testing.assert_array_equal(np.stack(again.images), read_images(tmp_path / "s", 3))
    other = "autoguide={scale: 3, run: weak}"  # of all levels, of which one was exported with a weaker denoiser
    said = fails("sample", "--pretrained", tmp_path / "model", "--set", other, "--count", 2, "--out", tmp_path / "o")
    assert "z_0 has no weaker denoiser for sampling.autoguide" in said
    assert not (tmp_path / "o").exists()


def test_a_head_that_the_command_line_gave_is_sampled_with_and_exported(trained: Trained, tmp_path: Path) -> None:
    """After `train --set side_loss=0.25` the recipe beside the checkpoint says nothing of a side head."""
    run = make_run(trained, tmp_path, training={"side_loss": 0.25})
    for folder in run.iterdir():
        text = (folder / "recipe.yaml").read_text()
        assert "  side_loss: 0.25\n" in text
        (folder / "recipe.yaml").write_text(text.replace("  side_loss: 0.25\n", ""))
    pipe, guidance = NestedPipeline.from_run(run), {"internal_guidance": {"scale": 1.5}}
    assert pipe.recipe.training.side_loss is None
    pipe.save_pretrained(tmp_path / "model")
    guided = pipe(num_images=2, **guidance).latents[0]
    assert float((guided - pipe(num_images=2).latents[0]).abs().max()) > 0.01
    again = NestedPipeline.from_pretrained(tmp_path / "model")(num_images=2, **guidance)
    torch.testing.assert_close(again.latents[0], guided, rtol=0, atol=0)


def test_a_small_vae_goes_along_and_a_large_one_is_named(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from nestgen.files import sha256_of
    from nestgen.sampling.decoder import load_decoder
    from nestgen.sharing import folder

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = AutoencoderKL(
        **blocks, block_out_channels=(8,), norm_num_groups=4, latent_channels=3, mid_block_add_attention=False
    )
    weights = tmp_path / "secret" / "vae.safetensors"
    weights.parent.mkdir()
    save_file(vae.state_dict(), weights)
    codec = {"name": "vae", "size": 8, "moments": True, "scale": 0.5, "weights": str(weights), "layout": "diffusers"}
    codec |= {"weights_sha256": sha256_of(weights), "config": json.loads(json.dumps(dict(vae.config)))}
    pipe = NestedPipeline.from_run(make_run(trained, tmp_path))
    pipe.samplers[0].trained.meta["codec"].update(codec)
    pipe = NestedPipeline(pipe.recipe, pipe.samplers, load_decoder(codec))
    images = np.stack(pipe(num_images=2).images)
    pipe.save_pretrained(tmp_path / "small")
    monkeypatch.setattr(folder, "LARGE", 10)
    pipe.save_pretrained(tmp_path / "large")
    shutil.rmtree(weights.parent)
    small = NestedPipeline.from_pretrained(tmp_path / "small")
    np.testing.assert_array_equal(np.stack(small(num_images=2).images), images)
    with pytest.raises(UserError, match=r"the VAE's weights vae\.safetensors are not there; name the file with --vae"):
        NestedPipeline.from_pretrained(tmp_path / "large")
    codec_file = tmp_path / "small" / "codec" / "diffusion_pytorch_model.safetensors"
    assert AutoencoderKL.from_pretrained(codec_file.parent).config.block_out_channels == [8]
    large = NestedPipeline.from_pretrained(tmp_path / "large", vae=codec_file)
    np.testing.assert_array_equal(np.stack(large(num_images=2).images), images)
    assert "give its file, vae.safetensors" in (tmp_path / "large" / "README.md").read_text()
    assert "VAE is not in this folder" not in (tmp_path / "small" / "README.md").read_text()
    codec_file.rename(tmp_path / "small" / "codec.safetensors")  # as in earlier exports
    config = (tmp_path / "small" / "config.json").read_text()
    document = json.loads(config.replace("codec/diffusion_pytorch_model.safetensors", "codec.safetensors"))
    write_json(tmp_path / "small" / "config.json", document)
    earlier = NestedPipeline.from_pretrained(tmp_path / "small")
    np.testing.assert_array_equal(np.stack(earlier(num_images=2).images), images)


def test_folders_that_are_something_else_or_damaged(trained: Trained, tmp_path: Path) -> None:
    pipe = NestedPipeline.from_run(make_run(trained, tmp_path))
    with pytest.raises(UserError, match="is not empty and no exported hierarchy"):
        pipe.save_pretrained(tmp_path / "runs")
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "leftover").write_text("x")
    pipe.save_pretrained(tmp_path / "model")  # in place of the earlier export
    assert not (tmp_path / "model" / "leftover").exists()
    with pytest.raises(UserError, match=r"is not an exported hierarchy: it has no config\.json"):
        NestedPipeline.from_pretrained(tmp_path)
    weights = tmp_path / "model" / "z1.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"z1\.safetensors is not what was written"):
        NestedPipeline.from_pretrained(tmp_path / "model")
    weights.unlink()
    with pytest.raises(UserError, match=r"model has no z1\.safetensors, which its config\.json names"):
        NestedPipeline.from_pretrained(tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "format": "nestgen-hierarchy/9"}))
    with pytest.raises(UserError, match="has format nestgen-hierarchy/9, and this nestgen reads"):
        NestedPipeline.from_pretrained(tmp_path / "model")
    outside = {**config, "levels": [{**config["levels"][0], "weights": "../z0.safetensors"}, *config["levels"][1:]]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(outside))
    with pytest.raises(UserError, match=r"names \.\./z0\.safetensors, which is not in that folder"):
        NestedPipeline.from_pretrained(tmp_path / "model")
    del config["levels"][0]["meta"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is damaged"):
        NestedPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/vae.pt", "vae.pt"),
        ("folder:/data/photos/", "folder:photos"),
        ("~/weights/x.bin", "x.bin"),
        ("../stores", "stores"),
        ("s3://bucket/photos", "s3://bucket/photos"),
        ("stores/scenes-train", "stores/scenes-train"),
        ("scenes:32", "scenes:32"),
        ("a 2/3 share: 1/2", "a 2/3 share: 1/2"),
        ({"_name_or_path": "/x/y", "a": ["/x/y", 3, None]}, {"a": ["y", 3, None]}),
    ],
)
def test_portable_values(value: object, expected: object) -> None:
    assert portable(value) == expected
