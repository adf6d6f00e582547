"""Programs of the commands' names that let another process run them: each of a workflow's dozens would import for seconds."""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as served:
    served.connect({address!r})
    served.sendall(json.dumps([os.getcwd(), {name!r}, *sys.argv[1:]]).encode())
    served.shutdown(socket.SHUT_WR)
    code, out, err = json.loads(b"".join(iter(lambda: served.recv(1 << 16), b"")))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code if code >= 0 else 70)
"""


@contextmanager
def serving(command_line: Callable[..., tuple[int, str, str]], folder: Path) -> Iterator[Path]:
    """The folder of the programs `featurize` and `nestgen`, which `command_line` runs, and of python beside them."""

    class Call(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            where, *words = json.loads(self.rfile.read())
            self.wfile.write(json.dumps(command_line(Path(where), *words)).encode())

    address = folder / "served"
    programs = {
        name: CLIENT.format(python=sys.executable, address=str(address), name=name) for name in ("featurize", "nestgen")
    }
    programs["python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    with socketserver.ThreadingUnixStreamServer(str(address), Call) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder / "bin"
        server.shutdown()
