"""Is a store root what it says it is? Every block's digest, bad rows, statistics, and levels against their base store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from featurize.basis.moments import load_moments
from featurize.basis.standardise import Sums, merge_sums, sums_of
from featurize.basis.svd import load_basis
from featurize.errors import UserError
from featurize.execution.tasks import Run, in_order
from featurize.extraction.levels import level_task, pooled_block, standardised_block
from featurize.io.files import read_json
from featurize.store.layout import (
    base_path,
    basis_path,
    block_moments_path,
    blocks_folder,
    chunk_path,
    has_metadata,
    is_sealed,
    ledger_path,
    list_arrays,
    metadata_copy_path,
    moments_path,
    seal_path,
    written_blocks,
)
from featurize.store.ledger import Ledger, has_whole_content, read_ledger, read_ledger_metadata, read_table
from featurize.store.metadata import (
    FORMAT,
    ArrayMetadata,
    ArraySpec,
    fingerprint,
    is_as_copied,
    metadata_copy,
    read_metadata,
    spec_of,
)
from featurize.store.read import open_array
from featurize.store.seal import Record, array_sha256, chunk_problem, is_record, read_record, read_seal

# So far a level may be from what this processor makes of the base store: another adds in another order, and float16 may then
# round to the value beside. In units of the stored values, whose standard deviation is 1.
UNIT, UNIT_AT_ZERO = 2.0**-10, 2.0**-14
ROUNDING = 1e-2  # of a channel's spread: so far a base store's statistics may be from its tokens' (float16)


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: in a whole array, in one of its blocks, or (without array) in the ledger."""

    where: Path
    problem: str
    block: int | None = None

    def __str__(self) -> str:
        return f"{self.where}{'' if self.block is None else f', block {self.block}'}: {self.problem}"


@dataclass(frozen=True)
class BlockCheck:
    """A block to check; `labels` are those of its rows. A level is compared with the base store where `compare_with_base`."""

    spec: ArraySpec
    block: int
    record: Record | None
    labels: np.ndarray | None = None
    compare_with_base: bool = False


@dataclass(frozen=True)
class BlockReport:
    """The problems of a block, and sums over its values (a base store's own, or those a level was standardised by)."""

    problems: list[str] = field(default_factory=list)
    sums: Sums | None = None


def verify(root: Path, run: Run) -> list[Finding]:
    """All findings about a store root, none when it is whole. Reads every block once, and the base store once a level.

    Without a whole ledger nothing else can be checked. Raises UserError when it is not a store root.
    """
    check_root(root)
    findings = [Finding(ledger_path(root), problem) for problem in ledger_problems(root)]
    if findings:
        return findings
    ledger = read_ledger(root)
    damaged: dict[Path, set[int]] = {}
    for path in list_arrays(root):
        own = _check_array(path, ledger, damaged, run)
        damaged[path] = {finding.block for finding in own if finding.block is not None}
        findings += own
    return findings


def check_root(root: Path) -> None:
    """Raises UserError for a folder without a ledger and without arrays."""
    if not ledger_path(root).is_file() and not list_arrays(root):
        raise UserError(f"{root} is not a store root (it has no rows.parquet).")


def ledger_problems(root: Path) -> list[str]:
    """What is wrong with a root's ledger: it is missing, can't be read, or contradicts itself."""
    if not ledger_path(root).is_file():
        return ["is missing; `featurize repair` makes it again"]
    try:
        return list(_contradictions(root, read_ledger(root)))
    except UserError as error:
        return [str(error)]


def _contradictions(root: Path, ledger: Ledger) -> Iterator[str]:
    table = read_table(ledger_path(root), ["row", "key", "status", "reason", "sha256"])
    stored = pc.is_valid(table["row"])
    if ledger.table["row"].to_pylist() != list(range(ledger.rows)):
        yield "its rows are not 0, 1, 2, ... in order"
    if len(set(ledger.keys)) < ledger.rows:
        yield "a key has more than one row"
    if not pc.all(pc.equal(stored, pc.equal(table["status"], "ok"))).as_py():
        yield "a line has a row and is refused, or has none and is not"
    if pc.any(pc.and_(pc.invert(stored), pc.equal(table["reason"], ""))).as_py():
        yield "a refused picture has no reason"
    if ledger.table["sha256"].null_count or pc.any(pc.equal(ledger.table["sha256"], "")).as_py():
        yield "a stored picture has no digest"
    if read_ledger_metadata(ledger_path(root)).get("keys_sha256") != ledger.keys_sha256:
        yield "its keys_sha256 is not that of its keys"
    elif not has_whole_content(ledger_path(root)):
        yield "its content is not what was written: its digest is another"


def _check_array(path: Path, ledger: Ledger, damaged: dict[Path, set[int]], run: Run) -> list[Finding]:
    try:
        open_array(path)
        metadata = read_metadata(path)
        spec = spec_of(path, metadata)
    except Exception:  # zarr raises many kinds for a damaged array, and attributes may be missing
        what = "its zarr.json can't be read" if has_metadata(path) else "its zarr.json is missing"
        return [Finding(path, f"{what}; {_remedy(path)}")]
    try:
        findings = [Finding(path, problem) for problem in _metadata_problems(spec, metadata, ledger)]
        # Where zarr.json is not what was written, its blocks can't be read as they were.
        return findings + (_block_findings(spec, ledger, damaged, run) if is_as_copied(path) else [])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if metadata_copy(path) is not None and is_as_copied(path):
            raise
        return [Finding(path, f"its zarr.json is damaged ({type(error).__name__}: {error}); {_remedy(path)}")]


def _block_findings(spec: ArraySpec, ledger: Ledger, damaged: dict[Path, set[int]], run: Run) -> list[Finding]:
    """Findings about an array's seal or records, its blocks and its statistics."""
    path, findings = spec.path, []
    records, problems = _records(spec)
    findings += [Finding(path, problem) for problem in problems]
    base = base_path(path.parent)
    usable = spec.kind == "level" and _can_be_read(base)
    checks = [
        BlockCheck(
            spec,
            block,
            record,
            _labels_of(spec, ledger, block),
            usable and block not in damaged.get(base, set()),
        )
        for block, record in sorted(records.items())
    ]
    sums: list[Sums] = []
    for check, report in zip(checks, in_order(run(_check_block, checks))):
        findings += [Finding(path, problem, check.block) for problem in report.problems]
        sums += [report.sums] if report.sums is not None else []
    if len(sums) == spec.blocks and not any(finding.block is not None for finding in findings):
        findings += [Finding(path, problem) for problem in _statistics_problems(spec, merge_sums(sums))]
    return findings


def _remedy(array: Path) -> str:
    """What to do about a zarr.json that can't be read."""
    if metadata_copy(array) is not None:
        return "`featurize repair` restores it from its copy"
    if is_sealed(array):
        return "its seal has no copy: remove the array with its .seal.json and run again the command that made it"
    return "run again the command that made it, it begins this array anew"


def _can_be_read(array: Path) -> bool:
    """Whether an array's zarr.json is whole, so that its values are read as they were written."""
    try:
        open_array(array)
    except Exception:  # zarr raises many kinds for a damaged array
        return False
    return is_as_copied(array)


def _metadata_problems(spec: ArraySpec, metadata: ArrayMetadata, ledger: Ledger) -> Iterator[str]:
    if metadata.attributes.get("format") != FORMAT:
        yield f"is not in the format {FORMAT}"
    if metadata.attributes["fingerprint"] != fingerprint(spec.provenance):
        yield "its fingerprint is not that of its provenance"
    if not is_as_copied(spec.path):
        yield (
            "its zarr.json is not the one that was sealed" if is_sealed(spec.path) else "its zarr.json is not its copy"
        )
    if not is_sealed(spec.path) and metadata_copy_path(spec.path).is_file() and metadata_copy(spec.path) is None:
        yield "the copy of its zarr.json is damaged"
    for name in ledger.differences(spec.provenance):
        yield f"its {name} is not the ledger's: it was made of other images, labels or captions"
    if spec.keys_sha256 != ledger.keys_sha256:
        yield "its keys_sha256 is not the ledger's: its rows are other pictures"
    if spec.kind in ("base", "level", "z0", "labels") and spec.shape[0] != ledger.rows:
        yield f"has {spec.shape[0]} rows and the ledger {ledger.rows}"
    if metadata.chunks != (spec.rows_per_block, *spec.shape[1:]):
        yield f"its chunks {metadata.chunks} are not blocks of {spec.rows_per_block} rows"
    if spec.kind in ("base", "level") and not has_basis(spec):
        yield "basis.safetensors beside it is missing, damaged, or not the basis it was made with"
    moments = moments_path(spec.path.parent)
    if spec.kind == "base" and moments.is_file() and not has_moments(moments):
        yield f"{moments.name} beside it is damaged; `featurize repair` encodes all pictures to make it again, or remove it"


def has_basis(spec: ArraySpec) -> bool:
    """Whether the basis beside a base store or a level is the one it was made with."""
    try:
        basis = load_basis(basis_path(spec.path.parent))
    except UserError:
        return False
    return basis.sha256 == spec.attributes.get("basis_sha256")


def has_moments(path: Path) -> bool:
    """Whether a file of moments is there and whole."""
    try:
        load_moments(path)
    except UserError:
        return False
    return True


def _records(spec: ArraySpec) -> tuple[dict[int, Record | None], list[str]]:
    """The records of the blocks that should be there (None for a damaged one), and what is wrong with the seal."""
    if not is_sealed(spec.path):
        written = sorted(written_blocks(spec.path))
        if not blocks_folder(spec.path).exists():
            return {}, ["has neither a seal nor records of its blocks"]
        missing = spec.blocks - len(written)
        state = f"is unfinished: {missing} of {spec.blocks} blocks are not written" if missing else "has no seal"
        return {block: read_record(spec, block) for block in written}, [state]
    try:
        seal = read_json(seal_path(spec.path))
        blocks = list(seal["blocks"])
        digest = array_sha256(blocks)
    except (UserError, KeyError, TypeError):
        return {}, ["its seal can't be read"]
    problems = []
    expected = {
        "kind": spec.kind,
        "rows": spec.rows,
        "block_rows": spec.rows_per_block,
        "keys_sha256": spec.keys_sha256,
        "fingerprint": spec.fingerprint,
        "sha256": digest,
    }
    for key, value in expected.items():
        if seal.get(key) != value:
            problems.append(f"its seal says another {key} than {'its blocks' if key == 'sha256' else 'zarr.json'}")
    if "metadata" in seal and metadata_copy(spec.path) is None:
        problems.append("the copy of zarr.json in its seal is damaged")
    if len(blocks) != spec.blocks:
        problems.append(f"its seal has {len(blocks)} blocks instead of {spec.blocks}")
    if not problems and not _has_whole_seal(spec.path):
        problems.append("its seal is not what was written: its digest is another")
    records = {
        block: record if is_record(record, spec, block) else None for block, record in enumerate(blocks[: spec.blocks])
    }
    return records, problems


def _has_whole_seal(array: Path) -> bool:
    try:
        read_seal(array)
    except (UserError, OSError):
        return False
    return True


def _labels_of(spec: ArraySpec, ledger: Ledger, block: int) -> np.ndarray | None:
    rows = spec.rows_of(block)
    return ledger.labels[rows.start : rows.stop] if spec.kind == "labels" else None


def _check_block(check: BlockCheck) -> BlockReport:
    spec, dimensions = check.spec, len(check.spec.shape)
    problem = chunk_problem(spec.path, check.block, check.record, dimensions)
    if problem:
        return BlockReport([problem])
    if spec.kind == "base" and not is_sealed(spec.path) and not has_moments(block_moments_path(spec.path, check.block)):
        return BlockReport(["its moments are missing or damaged"])
    rows = spec.rows_of(check.block)
    chunk = chunk_path(spec.path, check.block, dimensions).read_bytes()
    if len(chunk) != spec.bytes_per_block:
        return BlockReport([f"has {len(chunk)} bytes, and by zarr.json a block has {spec.bytes_per_block}"])
    stored = np.frombuffer(chunk, np.dtype(spec.dtype).newbyteorder("<"))
    values = stored.reshape(spec.rows_per_block, *spec.shape[1:])[: len(rows)]
    problems = _row_problems(values, rows, check)
    sums = sums_of(values) if spec.kind == "base" else None
    if check.compare_with_base:
        task = level_task(spec, check.block)
        expected = standardised_block(task).astype(spec.dtype).astype(np.float32)
        near = np.isclose(values.astype(np.float32), expected, rtol=UNIT, atol=UNIT_AT_ZERO)
        wrong = np.flatnonzero(~near.reshape(len(values), -1).all(axis=1))
        if wrong.size:
            problems.append(
                f"{wrong.size} rows, the first {rows.start + wrong[0]}, are not the base store's, pooled and standardised"
            )
        sums = sums_of(pooled_block(task))
    return BlockReport(problems, sums)


def _row_problems(values: np.ndarray, rows: range, check: BlockCheck) -> list[str]:
    problems = []
    if check.labels is not None and not np.array_equal(values, check.labels):
        problems.append("its labels are not the ledger's")
    if values.dtype.kind == "f":
        flat = values.reshape(len(values), -1)
        bad = np.flatnonzero(~np.isfinite(flat).all(axis=1))
        if bad.size:
            problems.append(f"{bad.size} rows, the first {rows.start + bad[0]}, hold NaN or infinite values")
        # An image of one colour is constant in pixels; no encoder's map is.
        constant = (
            np.flatnonzero((flat == flat[:, :1]).all(axis=1)) if check.spec.kind in ("base", "level") else bad[:0]
        )
        if constant.size and flat.shape[1] > 1:
            problems.append(f"{constant.size} rows, the first {rows.start + constant[0]}, are constant")
    return problems


def _statistics_problems(spec: ArraySpec, sums: Sums) -> Iterator[str]:
    """Mean and std over all blocks against what the attributes, or the tokens' moments, say."""
    mean, std = sums.mean, sums.std
    if spec.kind == "level" and "taken" not in spec.provenance["standardisation"]:
        for name, measured in (("mean", mean), ("std", std)):
            if not np.allclose(measured, spec.attributes[name], rtol=1e-6, atol=1e-9 * std.max()):
                yield f"its attribute {name} is not that of the base store's pooled rows"
    moments_file = moments_path(spec.path.parent)
    if spec.kind == "base" and moments_file.is_file() and has_moments(moments_file) and has_basis(spec):
        basis = load_basis(basis_path(spec.path.parent))
        moments, _ = load_moments(moments_file)
        directions = basis.components[:, : spec.shape[-1]]
        expected_mean = (moments.mean - basis.mean) @ directions
        variance = np.einsum("dk,de,ek->k", directions, moments.scatter, directions) / moments.count
        expected_std = np.sqrt(np.maximum(variance, 0.0))  # of fewer tokens than channels, some round to less than none
        floor = 1e-3 * expected_std.max()
        if not np.allclose(mean, expected_mean, atol=ROUNDING * expected_std.max()) or not np.allclose(
            std, expected_std, rtol=ROUNDING, atol=floor
        ):
            yield "its channels' mean and std are not those of the tokens it was made of (moments.safetensors)"
