"""A table of mistakes that people make: each ends with one sentence and an exit code other than 0, never with a traceback."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from nestgen.cli.main import main
from tests.featurize.conftest import extraction as extraction
from tests.featurize.conftest import featurize as featurize
from tests.featurize.conftest import no_network as no_network
from tests.featurize.conftest import picture_folder as picture_folder
from tests.featurize.conftest import vit_weights as vit_weights
from tests.nestgen.conftest import experiment as experiment
from tests.nestgen.conftest import little as little
from tests.nestgen.conftest import one_thread as one_thread
from tests.nestgen.conftest import trained as trained
from tests.nestgen.sharing.test_export import make_run

# A command, and words of its sentence. ROOT is a store root.
OF_FEATURIZE = """
extrakt                                                         | No such command 'extrakt'
extract --levls 4x4x4                                           | No such option '--levls'
extract                                                         | Where should the stores go? Give --out DIR
extract --out s                                                 | Which pictures? Name a SOURCE
extract pictures --out s                                        | of an unknown kind; start it with one of
extract s3://bucket --out s                                     | of an unknown kind; start it with one of
extract folder:pictures --out s                                 | is not there; check the path of SOURCE
extract folder: --out s                                         | error:
extract wds:x-{0..9 --out s                                     | x-{0..9 are not in pairs; write train-
extract wds:x-{0..999999999999}.tar --out s                     | stands for 1,000,000,000,000 shards; the most are
extract wds:x-*.tar --out s                                     | No shard is named like
extract imagenet:nowhere --out s                                | is not there
extract scenes:100000 --out s                                   | needs a size in pixels from 8 to 1024
extract scenes --out nope://x                                   | can't be reached
extract scenes --out s --encoder tinny                          | There is no encoder 'tinny'; known are tiny
extract scenes --out s --encoder clip                           | can't be fetched
extract scenes --out s --weights no.pt --encoder dino           | no.pt of dino are not there; check --weights
extract scenes --out s --encoder pixels --weights no.pt         | has no weights; leave --weights out
extract scenes --out s --model-args [[[                         | can't be read; write img_size=64,patch_size=8
extract scenes --out s --model-args depth=x                     | error:
extract scenes --out s --model-args size=1                      | error:
extract scenes --out s --z0 pixels                              | There is no codec 'pixels' for z_0
extract scenes --out s --z0 vae:33 --z0-weights tiny            | does not work: the network reduces by
extract scenes --out s --z0-weights tiny                        | has no weights and no scale
extract scenes --out s --levels 4x4                             | write height x width x channels
extract scenes --out s --levels 100000x100000x3 --limit 2       | is larger than the 8x8 grid of tiny
extract scenes --out s --levels 4x4x4000 --limit 2              | asks for 4000 channels; tiny has 128
extract scenes --out big --z0 pixels:200000 --limit 2           | its disk has
extract scenes --out s --max-bad many                           | must be a count like 100 or a share like 1%
extract scenes --out s --basis nowhere                          | There is no basis at
extract scenes --out s --split val                              | are held out, so they need the training pictures' basis
extract scenes --out s --recipe no.yaml                         | The recipe no.yaml can't be read
extract scenes --out a-file/s --limit 2                         | A folder of this path is a file
extract --recipe deep.yaml                                      | is nested too deeply
extract --recipe words.yaml                                     | holds no keys
extract --recipe bytes.yaml                                     | is not UTF-8 text
extract --recipe typo.yaml                                      | did you mean 'features'?
levels 4x4x4 --out nowhere                                      | There is no store at
levels 9x9x9 --out ROOT --encoder timm:vit_tiny_patch16_224     | is larger than the 4x4 grid
info nowhere                                                    | is not a store root
verify nowhere                                                  | is not a store root
repair nowhere                                                  | is not a store root
ls nowhere                                                      | holds no store root
images nowhere --out i                                          | is not a store root
knn-viz --stores ROOT --rows few                                | give a number from 3 on, or all
knn-viz --stores ROOT --encoder clip                            | error:
knn-viz --stores ROOT,ROOT --encoder a,b,c                      | give one for each, or one for all
scenes --count 99999999999 --out s                              | is not in the range
scenes --count 3 --size 100000 --out s                          | is not in the range
scenes --count three --out s                                    | 'three' is not a valid integer
check-encoder nothing                                           | There is no encoder 'nothing'
check-encoder dino --weights a-file                             | error:
embed-text --prompts no.txt --out p                             | The prompts no.txt can't be read
plan no.yaml                                                    | The recipe no.yaml can't be read
"""
OF_NESTGEN = """
trane                                                           | No such command 'trane'
train                                                           | Missing option '--level'
train --level zero                                              | 'zero' is not a valid integer
train --level 99999999999                                       | is not within 0..2
train --level 0 --depth 9                                       | depth 9 is not within 1..3
train --level 0 --set batch                                     | is not KEY=VALUE
train --level 0 --set batch=many                                | training.batch
train --level 0 --set batch=-1                                  | should be greater than 0
train --level 0 --set speed=1                                   | training.speed is not a key
train --level 0 --set batch=[[[[                                | is not valid YAML
train --level 0 --depth 1 --set batch=99999999999999 --recipe fresh.yaml | do not fit into the memory of this
train --level 0 --init no.pth --recipe fresh.yaml               | File 'no.pth' does not exist
train --level 0 --recipe no.yaml                                | there is no recipe no.yaml
info --recipe deep.yaml                                         | has more than 50 levels
info --recipe words.yaml                                        | is not a recipe
info --recipe bytes.yaml                                        | is not UTF-8 text
info --recipe huge.yaml                                         | which is too large
info --recipe typo.yaml                                         | is not a key; did you mean
sample                                                          | Missing option '--out'
sample --out s --count 0                                        | is not in the range
sample --out s --count 99999999999                              | the latents of 99,999,999,999 samples take
sample --out s --count 2 --batch-size 99999999999               | samples in one pass do not fit into the memory
sample --out s --count 2 --set steps=100000000000               | should be less than or equal to 10000
sample --out s --label 7                                        | there is no label 7: the denoisers have classes 0 to 2
sample --out s --label dog                                      | --label: there is no class named 'dog'
sample --out s --step 3                                         | step 3
sample --out s --step last                                      | neither a step number nor `best`
sample --out s --prompt x --prompts y                           | exclude each other
sample --out s --prompt x                                       | error:
sample --out s --like 4000                                      | 4000
sample --out s --like 1 --freeze-from 9                         | 9
sample --out runs                                               | runs
sample --out s --pretrained scene                               | there is no exported hierarchy scene
sample --out a-file/s                                           | a-file
hierarchy --columns 999999999                                   | is not in the range
hierarchy --like 1 --over-depth                                 | exclude each other
sheet nowhere --titles a,b --out x.png                          | 2 titles for 1 folders
sheet nowhere --titles a --out x.png                            | nowhere has no 000000.png
evaluate --samples nowhere                                      | nowhere has no sample.json
diagnose --samples nowhere                                      | nowhere has no sample.json
nearest --samples nowhere                                       | nowhere has no sample.json
compare no.json                                                 | no.json is not there; check the path
compare a-file                                                  | a-file cannot be read: it is not JSON
ema --level 0 --length 0.1 --name x                             | has no snapshots
export nowhere --out x                                          | nowhere
export runs/toy --out stores                                    | is not empty and no exported hierarchy
explore nowhere                                                 | nowhere
"""


def rows_of(table: str) -> list[tuple[list[str], str]]:
    parts = [line.split("|", 1) for line in table.strip().splitlines()]
    return [(shlex.split(command), words.strip()) for command, words in parts]


def write_files(folder: Path) -> None:
    (folder / "a-file").write_text("text")
    (folder / "deep.yaml").write_text("a: " + "[" * 3000)
    (folder / "words.yaml").write_text("- a\n")
    (folder / "bytes.yaml").write_bytes(bytes(range(256)))
    (folder / "typo.yaml").write_text("name: x\nfeature: {out: s}\nlevels: [{shape: 8x8x3}]\n")
    (folder / "huge.yaml").write_text(
        "name: x\nfeatures: {out: s, z0: 'pixels:8'}\nlevels: [{shape: 8x8x3}, {shape: 2x2x99999999999}]\n"
    )


def faults(command: list[str], words: str, code: int, errors: str) -> list[str]:
    """What is wrong with how a mistake ended."""
    sentences = [line for line in errors.splitlines() if line.lower().startswith("error: ")]
    found = []
    if code not in (1, 2) or "Traceback" in errors:
        found.append(f"exit code {code}")
    if len(sentences) != 1:
        found.append(f"{len(sentences)} sentences")
    if words not in errors:
        found.append(f"does not say {words!r}")
    return [f"{' '.join(command)}: {', '.join(found)}: {errors[-300:]}"] if found else []


def test_mistakes_with_featurize(
    extraction: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    featurize: Callable[..., object],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    table = rows_of(OF_FEATURIZE)
    wrong = []
    for command, words in table:
        outcome = featurize(*(word.replace("ROOT", str(extraction)) for word in command))
        wrong += faults(command, words, outcome.code, outcome.err)  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)
    assert len(table) + len(rows_of(OF_NESTGEN)) >= 100


def test_mistakes_with_nestgen(trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(trained, tmp_path, classes=3, denoiser={"size": "nano", "labels": 3}, training={"steps": 7, "batch": 4})
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    (tmp_path / "fresh.yaml").write_text((tmp_path / "nested.yaml").read_text().replace("name: toy", "name: fresh"))
    wrong = []
    for command, words in rows_of(OF_NESTGEN):
        result = CliRunner().invoke(main, command)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            wrong.append(f"{' '.join(command)}: {result.exception!r}")
        else:
            wrong += faults(command, words, result.exit_code, result.stderr)
    assert not wrong, "\n".join(wrong)
