"""CLIP's two towers: three layouts of one network, its activation, and the reference in float64."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.torch import save_file
from torch import Tensor

from featurize.checkpoints.clip import read_clip
from featurize.encoders import EncoderSpec, encode, load_encoder
from featurize.errors import UserError
from featurize.text.tower import TextSpec, load_text_encoder, seen_part, token_ids
from tests.featurize import reference
from tests.featurize.conftest import Outcome, options
from tests.featurize.encoders.test_encoders import PICTURES, hold, normalised
from tests.featurize.layouts import clip_state, described, torchscript_clip, transformers_clip

VISUAL = {"img_size": 64, "width": 64, "layers": 2, "heads": 2, "embed_dim": 24}
TEXT = {"width": 32, "layers": 2, "heads": 2}
CAPTIONS = ["", "a red boat\nnear  a house", "two dogs &amp; a cat " * 20]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return clip_state(64, 2, 16, 4, 24, (32, 2, 77))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> dict[str, Path]:
    """The same weights as OpenAI, open_clip and transformers publish them, and as a bare state dict."""
    root = tmp_path_factory.mktemp("clip")
    for name in ("openai", "open_clip", "transformers", "bare"):
        (root / name).mkdir()
    found = {"openai": torchscript_clip(root / "openai" / "ViT-B-16.pt", state)}
    found["open_clip"] = root / "open_clip" / "open_clip_pytorch_model.bin"
    torch.save(state, found["open_clip"])
    (root / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    found["transformers"] = root / "transformers" / "model.safetensors"
    save_file({key: value.contiguous() for key, value in transformers_clip(state).items()}, found["transformers"])
    (root / "transformers" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    found["bare"] = root / "bare" / "clip.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, found["bare"])
    for path in found.values():
        described(path, **VISUAL)
    return found


def test_clip_computes_the_papers_tokens(files: dict[str, Path], state: dict[str, Tensor]) -> None:
    encoder = hold(EncoderSpec("clip", str(files["openai"])), lambda x: reference.clip_visual(state, x, 2))
    assert (encoder.grid, encoder.channels) == ((4, 4), 64)
    assert encoder.activation_witness == "the code inside the archive"
    assert (encoder.identity["norm"], encoder.identity["projection"]) == ("ln_post", False)
    assert encoder.identity["activation"] == "quick_gelu"
    # The other readings, each with an identity of its own.
    bare = hold(
        EncoderSpec("clip", str(files["openai"]), '{"norm": "none"}'),
        lambda x: reference.clip_visual(state, x, 2, norm=False),
    )
    projected = hold(
        EncoderSpec("clip", str(files["openai"]), '{"projection": true}'),
        lambda x: reference.clip_visual(state, x, 2) @ state["visual.proj"].double(),
    )
    assert projected.channels == 24
    assert bare.identity != encoder.identity != projected.identity


def test_the_three_layouts_give_equal_features(files: dict[str, Path]) -> None:
    found = {}
    for name, path in files.items():
        encoder = load_encoder(EncoderSpec("clip", str(path)), "cpu")
        found[name] = encode(encoder, PICTURES, "cpu", "float32")
    for name in ("open_clip", "transformers", "bare"):
        assert torch.equal(found[name], found["openai"]), name


def test_a_bare_state_dict_says_nothing_of_its_activation(
    files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load_encoder(EncoderSpec("clip", str(files["bare"]), '{"layers": 2}'), "cpu")
    assert encoder.activation_witness == ""
    assert "Nothing in or beside" in caplog.text


def test_a_gelu_mixup_is_an_error_where_a_file_names_it(tmp_path: Path, state: dict[str, Tensor]) -> None:
    archive = described(torchscript_clip(tmp_path / "gelu.pt", state, quick=False), **VISUAL)
    with pytest.raises(UserError, match=r"computes with quick_gelu, but the code inside the archive of .* says gelu"):
        load_encoder(EncoderSpec("clip", str(archive)), "cpu")
    torch.save(state, tmp_path / "w.bin")
    described(tmp_path / "w.bin", **VISUAL)
    for config, content in [
        ("config.json", {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}),
        ("open_clip_config.json", {"model_cfg": {"embed_dim": 24}}),  # open_clip's default is GELU
    ]:
        (tmp_path / config).write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{config} beside .* says gelu"):
            load_encoder(EncoderSpec("clip", str(tmp_path / "w.bin")), "cpu")
        # Said openly, GELU is what it computes.
        encoder = load_encoder(EncoderSpec("clip", str(tmp_path / "w.bin"), '{"activation": "gelu"}'), "cpu")
        wanted = reference.clip_visual(state, normalised(encoder, PICTURES), 2, reference.gelu)
        found = encode(encoder, PICTURES, "cpu", "float32").flatten(1, 2)
        assert reference.furthest(found, wanted) <= 1e-5
        # And that is far from QuickGELU: an unnoticed mix-up would not pass for rounding.
        assert reference.furthest(found, reference.clip_visual(state, normalised(encoder, PICTURES), 2)) > 1e-3
        (tmp_path / config).unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("visual.ln_post")},
            "2 keys are missing (first 'ln_post",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "visual.proj"}, "1 keys are missing (first 'proj')"),
        (lambda s: s | {"visual.positional_embedding": torch.ones(5, 64)}, "'positional_embedding' is (5, 64)"),
        (lambda s: s | {"visual.trunk.weight": torch.ones(1)}, "1 unexpected (first 'trunk.weight')"),
        (
            lambda s: {"blocks.0.norm1.weight": torch.ones(3)},
            "are not a CLIP file in OpenAI's, open_clip's or transformers'",
        ),
    ],
)
def test_a_wrong_clip_file_is_one_sentence(tmp_path: Path, state: dict[str, Tensor], change, sentence: str) -> None:  # type: ignore[no-untyped-def]
    torch.save(change(state), tmp_path / "wrong.pt")
    with pytest.raises(UserError) as raised:
        load_encoder(EncoderSpec("clip", str(described(tmp_path / "wrong.pt", **VISUAL))), "cpu")
    assert sentence in str(raised.value)


def test_transformers_half_a_layer_is_one_sentence(tmp_path: Path, state: dict[str, Tensor]) -> None:
    broken = transformers_clip(state)
    del broken["vision_model.encoder.layers.1.self_attn.k_proj.weight"]
    torch.save(broken, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"lack 'vision_model.encoder.layers.1.self_attn.k_proj.weight'"):
        read_clip(tmp_path / "pytorch_model.bin")


def test_an_archive_that_would_run_code_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"are refused: it names \w+.system"):
        read_clip(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "short.pt").write_bytes(files["openai"].read_bytes()[:5000])
    with pytest.raises(UserError, match=r"short.pt"):
        read_clip(tmp_path / "short.pt")


def text_weights(folder: Path, state: dict[str, Tensor]) -> Path:
    """A small text tower of its own, as `--text-weights`."""
    torch.save(state, folder / "text.pt")
    return described(folder / "text.pt", **TEXT)


def test_the_text_tower_gives_the_last_hidden_states(tmp_path: Path, state: dict[str, Tensor]) -> None:
    encoder = load_text_encoder(TextSpec("clip", str(text_weights(tmp_path, state))), "cpu")
    ids = torch.tensor([token_ids(caption, 77) for caption in CAPTIONS])
    wanted = reference.clip_text(state, ids, 2)
    found = torch.from_numpy(encoder.encode(CAPTIONS))
    assert found.shape == (3, 77, 32)
    assert reference.furthest(found, wanted) <= 1e-5
    assert reference.least_cosine(found.half().float(), wanted) >= 0.999
    assert seen_part(CAPTIONS[0], 77) is None
    assert str(seen_part(CAPTIONS[2], 77)).startswith("two dogs & a cat two dogs")


def test_captions_are_padded_as_transformers_pads_them() -> None:
    """CLIPTokenizer(..., padding='max_length', truncation=True) of openai/clip-vit-large-patch14: published ids."""
    assert token_ids("a photo of a cat", 77) == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert token_ids("", 77) == [49406] + [49407] * 76
    long = token_ids("cat " * 100, 77)
    assert long == [49406] + [2368] * 75 + [49407]


def test_wrong_text_weights_are_one_sentence(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, described(tmp_path / "small.pt", **(TEXT | {"layers": 3})))
    with pytest.raises(UserError, match=r"keys are missing .*text tower of 12 layers"):
        load_text_encoder(TextSpec("clip", str(tmp_path / "small.pt")), "cpu")
    visual = {key: value for key, value in state.items() if key.startswith("visual.")}
    torch.save(visual, tmp_path / "visual.pt")
    with pytest.raises(UserError, match="keys are missing"):
        load_text_encoder(TextSpec("clip", str(described(tmp_path / "visual.pt", **TEXT))), "cpu")
    with pytest.raises(UserError, match="describes what no text tower has: colour"):
        load_text_encoder(TextSpec("clip", str(described(tmp_path / "visual.pt", colour=1))), "cpu")


def test_prompts_are_embedded_once(  # type: ignore[no-untyped-def]
    featurize, tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red boat\n\n" + "word " * 100 + "\n", encoding="utf-8")
    weights = text_weights(tmp_path, state)

    def embed(*more: object) -> Outcome:
        return featurize(
            "embed-text", "--prompts", prompts, "--out", tmp_path / "out", "--text-weights", weights, *more
        )

    outcome = embed()
    assert outcome.code == 0, outcome.err
    assert "1 of 3 captions have more than 77 tokens and are cut; the first is number 3" in caplog.text
    array = zarr.open_array(str(tmp_path / "out" / "text" / "77x32.zarr"), mode="r")
    assert (array.shape, array.attrs["kind"], array.attrs["null_row"]) == ((4, 77, 32), "text", 0)
    assert array.attrs["provenance"]["encoder"]["weights_sha256"]
    encoder = load_text_encoder(TextSpec("clip", str(weights)), "cpu")
    np.testing.assert_allclose(array[1], encoder.encode(["a red boat"])[0], atol=5e-3)
    np.testing.assert_array_equal(array[0], array[2])  # the empty caption, and the empty line
    table = pq.read_table(tmp_path / "out" / "prompts.parquet").to_pydict()
    assert table["row"] == [1, 2, 3]
    assert table["truncated"] == [False, False, True]
    before = (tmp_path / "out" / "text" / "77x32.seal.json").read_bytes()
    assert embed().code == 0
    assert (tmp_path / "out" / "text" / "77x32.seal.json").read_bytes() == before
    prompts.write_text("another\n", encoding="utf-8")
    outcome = embed()
    assert outcome.code == 1 and "differs in: captions_sha256" in outcome.err
    prompts.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in embed().err
    prompts.write_bytes(b"")
    assert "holds no prompt" in embed().err


def test_captions_stay_with_their_pictures(  # type: ignore[no-untyped-def]
    featurize, tmp_path: Path, shard: Path, state: dict[str, Tensor]
) -> None:
    weights = text_weights(tmp_path, state)
    outcome = featurize(
        "extract", f"wds:{shard}", "--out", tmp_path / "out", "--levels", "1x1x4", "--z0", "pixels:8", "--text", "clip",
        "--text-weights", weights, "--workers", 0,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "captions by row" in outcome.out
    root = tmp_path / "out"
    lines = [line for line in pq.read_table(root / "rows.parquet").to_pylist() if line["row"] is not None]
    offsets = zarr.open_array(str(root / "text" / "offsets.zarr"), mode="r")
    text = zarr.open_array(str(root / "text" / "77x32.zarr"), mode="r")
    assert offsets[:].tolist()[0] == 1 and offsets[-1] == text.shape[0] == 1 + sum(
        len(line["captions"]) for line in lines
    )
    assert text.attrs["keys_sha256"] == offsets.attrs["keys_sha256"] == zarr.open_array(
        str(root / "labels.zarr"), mode="r").attrs["keys_sha256"]  # fmt: skip
    assert featurize("verify", root).code == 0
    assert "text/77x32.zarr" in featurize("ls", root).out
    before = {path: path.read_bytes() for path in (root / "text").rglob("*") if path.is_file()}
    for chunk in (root / "text" / "77x32.zarr" / "c" / "0" / "0" / "0", root / "text" / "offsets.zarr" / "c" / "0"):
        chunk.write_bytes(chunk.read_bytes()[::-1])
    found = featurize("verify", root)
    assert found.out.count("block 0: has other bytes than were written") == 2
    assert featurize("repair", root).code == 0
    assert {path: path.read_bytes() for path in (root / "text").rglob("*") if path.is_file()} == before
    encoder = load_text_encoder(TextSpec("clip", str(weights)), "cpu")
    for line in lines[::4]:
        own = text[int(offsets[line["row"]]) : int(offsets[line["row"] + 1])]
        np.testing.assert_allclose(own, encoder.encode(line["captions"]), atol=5e-3)


def test_pictures_without_captions_have_none_to_embed(  # type: ignore[no-untyped-def]
    featurize, tmp_path: Path, picture_folder: Path, vit_weights: Path, state: dict[str, Tensor]
) -> None:
    from featurize.extraction.extract import extract
    from featurize.recipe import read_request

    chosen = options(picture_folder, vit_weights, tmp_path / "out", limit=4, text="clip",
                     text_weights=str(text_weights(tmp_path, state)))  # fmt: skip
    with pytest.raises(UserError, match="has a caption; leave --text out"):
        extract(read_request(None, chosen, "1x1x4"), 0, None)


def test_a_text_tower_of_gelu_says_where_to_write_it(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """`embed-text` has no --model-args; what the sentence says is done, and it works."""
    weights = described(torchscript_clip(tmp_path / "gelu.pt", state, quick=False), **TEXT)
    said = r'write \{"model_args": \{"activation": "gelu"\}\} into .*gelu.json'
    with pytest.raises(UserError, match=said):
        load_text_encoder(TextSpec("clip", str(weights)), "cpu")
    described(weights, **TEXT, activation="gelu")
    assert load_text_encoder(TextSpec("clip", str(weights)), "cpu").encode(["a red boat"]).shape == (1, 77, 32)


def test_text_is_embedded_in_float32(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """Not in TF32, whatever the container has set: the other networks are not either."""
    encoder = load_text_encoder(TextSpec("clip", str(text_weights(tmp_path, state))), "cpu")
    products, seen = torch.backends.cuda.matmul, set()
    before = products.allow_tf32
    products.allow_tf32 = True
    watch = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.add(products.allow_tf32))
    try:
        encoder.encode(["a red boat"])
        assert seen == {False}
        assert products.allow_tf32
    finally:
        watch.remove()
        products.allow_tf32 = before


def test_an_archive_with_a_damaged_directory_is_one_sentence(tmp_path: Path, files: dict[str, Path]) -> None:
    data = bytearray(files["openai"].read_bytes())
    entry = data.index(b"PK\x01\x02")  # the first of the central directory
    data[entry : entry + 4] = b"QQQQ"
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.pt can't be read: it is damaged, .*; fetch or copy"):
        read_clip(tmp_path / "bad.pt")
