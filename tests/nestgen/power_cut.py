"""What a power cut may leave of a folder: every state of a disk that a recorded writing allows."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Node = tuple[int, int]  # a file or folder: its inode, and how often that was freed before
Names = dict[Node, dict[str, Node]]  # what each folder holds
Files = dict[str, bytes]  # contents by path


@dataclass
class Disk:
    """The operations on a folder in order. What is there at first counts as being on the disk."""

    root: Path
    freed: dict[int, int] = field(default_factory=dict)
    trees: list[Names] = field(default_factory=list)  # after each operation
    synced: list[Node | None] = field(default_factory=list)  # by each operation, if it was fsync
    contents: list[dict[Node, bytes]] = field(default_factory=list)  # of the files on the disk, after each

    def node(self, status: os.stat_result) -> Node:
        return status.st_ino, self.freed.get(status.st_ino, 0)

    def record(self, synced: os.stat_result | None = None) -> None:
        tree: Names = {}
        paths: dict[Node, Path] = {}
        for folder, folders, files in os.walk(self.root):
            children = {name: self.node(os.stat(Path(folder, name))) for name in (*folders, *files)}
            tree[self.node(os.stat(folder))] = children
            paths |= {children[name]: Path(folder, name) for name in files}
        contents = (
            dict(self.contents[-1]) if self.contents else {node: path.read_bytes() for node, path in paths.items()}
        )
        node = None if synced is None else self.node(synced)
        if node in paths:
            contents[node] = paths[node].read_bytes()
        self.trees.append(tree)
        self.synced.append(node)
        self.contents.append(contents)

    def files(self, tree: Names, contents: dict[Node, bytes]) -> Files:
        """Files by path in a state; one whose bytes are not on the disk is empty."""

        def below(folder: Node, path: str) -> Iterator[tuple[str, bytes]]:
            for name, child in tree[folder].items():
                if child in tree:
                    yield from below(child, f"{path}{name}/")
                else:
                    yield f"{path}{name}", contents.get(child, b"")

        return dict(below(self.node(os.stat(self.root)), ""))

    def states(self) -> Iterator[Files]:
        """After a cut at any time: on file systems that keep the order of names, and on those that keep only what was synced."""
        strict = dict(self.trees[0])
        last = 0
        for time, (tree, node) in enumerate(zip(self.trees, self.synced)):
            if node is not None:
                last = time
                if node in tree:
                    strict[node] = tree[node]
            for earlier in range(last, time + 1):
                yield self.files(self.trees[earlier], self.contents[time])
            known = strict | {
                child: {} for names in strict.values() for child in names.values() if self.is_folder(child)
            }
            yield self.files({**known, **strict}, self.contents[time])

    def is_folder(self, node: Node) -> bool:
        return any(node in tree for tree in self.trees)


@contextmanager
def recorded(root: Path, patch: pytest.MonkeyPatch, fsync: bool = True) -> Iterator[Disk]:
    """Records what is done to a folder; without `fsync`, as if nobody called it."""
    disk = Disk(root)
    disk.record()

    def follow(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def followed(*arguments: Any, **options: Any) -> Any:
            if name == "fsync" and not fsync:
                return None
            disk.record()  # what was written meanwhile
            freed = (
                os.stat(*arguments, **options) if name in ("unlink", "rmdir") and _exists(arguments, options) else None
            )
            result = call(*arguments, **options)
            if freed is not None and (freed.st_nlink == 1 or stat.S_ISDIR(freed.st_mode)):
                disk.freed[freed.st_ino] = disk.freed.get(freed.st_ino, 0) + 1
            disk.record(os.fstat(arguments[0]) if name == "fsync" else None)
            return result

        return followed

    with patch.context() as within:
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            within.setattr(os, name, follow(name))
        yield disk


def _exists(arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    try:
        os.stat(*arguments, **options)
    except OSError:
        return False
    return True
