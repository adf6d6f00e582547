"""Files are whole or as they were."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nestgen.errors import UserError
from nestgen.files import atomic_write, read_json, sha256_of, write_json


def test_a_document_comes_back(tmp_path: Path) -> None:
    document = {"a": [1, 2.5, None], "b": {"c": "é"}}
    write_json(tmp_path / "new" / "x.json", document)
    assert read_json(tmp_path / "new" / "x.json") == document


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})

    def interrupted() -> None:
        with atomic_write(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read_json(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_a_damaged_document_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json"):
        read_json(path)


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
