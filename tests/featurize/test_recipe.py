"""A recipe is validated before any work: what is wrong is named, with the nearest right key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from featurize.errors import UserError
from featurize.recipe import Features, check_basis_choice, parse_shape, parse_shapes, read_request, with_absolute_paths

GOOD = """
name: x
features: {source: "folder:pictures", out: stores/x, views: 2}
levels:
  - {shape: 32x32x3}
  - {shape: 4x4x16, sigma: 0.5}
training: {steps: 3}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "nested.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_recipe_and_options_go_over_it(tmp_path: Path) -> None:
    request = read_request(write(tmp_path, GOOD), {"views": 1, "out": "elsewhere"}, None)
    assert request.features.source == f"folder:{tmp_path}/pictures"
    assert (request.features.out, request.features.views) == ("elsewhere", 1)
    assert request.levels == ((4, 4, 16),)
    assert read_request(tmp_path / "nested.yaml", {}, "2x2x8,1x1x4,2x2x8").levels == ((2, 2, 8), (1, 1, 4))


def test_another_encoder_does_not_get_the_weights_of_the_recipes(tmp_path: Path) -> None:
    recipe = write(tmp_path, GOOD.replace("views: 2", "encoder: vae, weights: sd-v1, model_args: {a: 1}"))
    assert read_request(recipe, {"encoder": "vae"}, None).features.weights == "sd-v1"
    other = read_request(recipe, {"encoder": "mocov3"}, None).features
    assert (other.encoder, other.weights, other.model_args) == ("mocov3", None, {})
    assert read_request(recipe, {"encoder": "mocov3", "weights": "w.pth"}, None).features.weights == "w.pth"


def test_another_codec_does_not_get_the_weights_of_the_recipes(tmp_path: Path) -> None:
    of_codec = {"z0_weights": "scenes", "z0_scale": 0.5, "z0_precision": "bfloat16"}
    recipe = write(tmp_path, GOOD.replace("views: 2", f"z0: vae:32, {json.dumps(of_codec)[1:-1]}"))
    same = read_request(recipe, {"z0": "vae:64"}, None).features
    assert {name: getattr(same, name) for name in of_codec} == of_codec
    assert not of_codec.keys() & read_request(recipe, {"z0": "pixels:8"}, None).features.model_fields_set
    assert read_request(recipe, {"z0": "taesd:32", "z0_weights": "w"}, None).features.z0_weights == "w"


def test_what_is_stored_of_options_is_relative_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()  # of that name there is an embedded VAE
    (tmp_path / "vae").mkdir()
    options = {"source": "wds:a.tar::s3://b/c.tar::/d.tar", "out": "x", "basis": "own", "weights": "w/tiny.pth"}
    names = {"z0_weights": "scenes", "text_weights": "vae", "classes": "imagenet100"}
    features = with_absolute_paths(read_request(None, {**options, **names, "views": 2}, None).features)
    assert (features.source, features.out) == (f"wds:{tmp_path}/a.tar::s3://b/c.tar::/d.tar", f"{tmp_path}/x")
    assert (features.weights, features.text_weights) == (f"{tmp_path}/w/tiny.pth", f"{tmp_path}/vae")
    assert (features.basis, features.z0_weights, features.classes) == ("own", "scenes", "imagenet100")
    assert features.model_fields_set == {*options, *names, "views"}
    for source in ("scenes:16", "folder:", "pictures"):
        assert with_absolute_paths(Features(out="s3://b/x", source=source)) == Features(out="s3://b/x", source=source)


def test_the_working_directorys_recipe_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert read_request(None, {}, None).features.out == str(tmp_path / "stores/x")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("features:", "featurs:", "unknown key 'featurs'; did you mean 'features'?"),
        ("views", "veiws", "'features.veiws'; did you mean 'views'"),
        ("views: 2", "views: 3", "'features.views' is 3"),
        ("views: 2", "views: two", "'features.views' is 'two'"),
        ("out: stores/x", "limit: 5", "Where should the stores go"),
        ("shape: 4x4x16", "shape: 4x4", "'4x4' can't be a level's shape"),
        ("shape: 4x4x16", "form: 4x4x16", "each with a shape"),
        ("{source", "[source", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    with pytest.raises(UserError) as raised:
        read_request(write(tmp_path, GOOD.replace(old, new)), {}, None)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_are_read_as_nestgen_reads_them(tmp_path: Path) -> None:
    """YAML 1.2: `2e-1` is a number, `no` a word, 1:30 no number of base sixty, and no key stands twice."""
    path = tmp_path / "nested.yaml"
    path.write_text("features: {source: 'folder:x', out: no, z0_scale: 2e-1}\nlevels: [{shape: 2x2x8}]\n")
    features = read_request(path, {}, None).features
    assert (features.z0_scale, Path(features.out).name) == (0.2, "no")
    path.write_text("features: {out: a, out: b}\n")
    with pytest.raises(UserError, match=r"nested\.yaml line 1 is not valid YAML: the key 'out' is given twice"):
        read_request(path, {}, None)


def test_a_missing_recipe_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        read_request(tmp_path / "none.yaml", {}, None)


@given(st.tuples(*[st.integers(1, 2000)] * 3))
def test_shapes_are_read_back(shape: tuple[int, int, int]) -> None:
    assert parse_shape("x".join(map(str, shape))) == shape


@given(st.text(alphabet="0123456789x,. -", max_size=12))
def test_any_text_is_shapes_or_one_sentence(text: str) -> None:
    try:
        shapes = parse_shapes(text)
    except UserError:
        return
    assert all(len(shape) == 3 and min(shape) > 0 for shape in shapes)


def test_the_home_folder_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    text = "features: {source: 'folder:~/pictures', out: ~/stores/x, weights: ~/w.pth, classes: ~/list}\n"
    features = read_request(write(tmp_path, text), {}, None).features
    home = f"{tmp_path}/me"
    assert (features.source, features.out) == (f"folder:{home}/pictures", f"{home}/stores/x")
    assert (features.weights, features.classes) == (f"{home}/w.pth", f"{home}/list")


def test_a_wrong_option_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--max-bad is 'many'; it must be a count like 100 or a share like 1%\.$"):
        read_request(write(tmp_path, GOOD), {"max_bad": "many"}, None)
    with pytest.raises(UserError, match=r"^'features\.max_bad' is 'many'"):
        read_request(write(tmp_path, GOOD.replace("views: 2", "max_bad: many")), {}, None)
    with pytest.raises(UserError, match=r"^SOURCE is .*caf\\\\xe9'; that is not UTF-8 text: rename"):
        read_request(None, {"source": "folder:/data/caf\udce9", "out": "x"}, None)


@pytest.mark.parametrize(
    ("source", "split", "held_out"),
    [
        ("scenes", "val", True),
        ("scenes", "train", False),
        ("coco:/data/val", "train", False),
        ("wds:/data/valid/x-{000000..000009}.tar", "train", True),
        ("wds:/data/train/val-000.tar", "train", True),
        ("wds:/data/{train,val}-000.tar", "train", False),
        ("folder:/data/val/images", "train", True),
        ("folder:/data/val2017", "train", True),
        ("folder:/data/val/train", "train", False),
        ("folder:/data/value", "train", False),
        ("imagenet:/data/ILSVRC2012_img_val.tar", "train", True),
        ("imagenet:/data/ILSVRC2012_img_train.tar", "train", False),
        ("imagenet:{folder}", "train", False),
        ("imagenet:{folder}", "val", True),
        ("imagenet:{folder}/val", "train", True),
    ],
)
def test_held_out_images_need_a_basis(tmp_path: Path, source: str, split: str, held_out: bool) -> None:
    for name in ("train", "val"):
        (tmp_path / "validation" / name).mkdir(parents=True)
    features = Features(out="x", source=source.replace("{folder}", f"{tmp_path}/validation"), split=split)
    if not held_out:
        check_basis_choice(features)
        return
    with pytest.raises(UserError, match=r"are held out, so they need the training pictures' basis"):
        check_basis_choice(features)
    check_basis_choice(features.model_copy(update={"basis": "own"}))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


def mappings_or_lists(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | scalars, inner, max_size=3)


documents = st.recursive(scalars, mappings_or_lists, max_leaves=5)
sections = st.dictionaries(st.sampled_from([*Features.model_fields, "x"]) | scalars, documents, max_size=4)
recipes = st.fixed_dictionaries(
    {}, optional={"features": sections.map(lambda section: section | {"out": "x"}) | documents, "levels": documents}
)


@settings(max_examples=200)
@given(
    st.one_of(
        st.text(max_size=40).map(str.encode),
        st.binary(max_size=40),
        recipes.map(lambda document: json.dumps(document, default=str, skipkeys=True).encode()),
    )
)
@example(b"features: {out: x, 1: 2}")
@example(b"features: {out: x, ? [a] : 2}")
@example(b"? {a: 1}\n: 2")
@example(b"features: {out: x}\nlevels: [{shape: [1]}]")
@example(b"features: {out: x, weights: ~nobody/w}")
@example(b"a: &x [*x]")
def test_a_recipe_of_any_bytes_is_a_request_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("r") / "nested.yaml"
    path.write_bytes(content)
    try:
        request = read_request(path, {}, None)
    except UserError as error:
        text = str(error)
    else:
        text = request.features.out
    assert "\n" not in text
    text.encode()
