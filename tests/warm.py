"""`tlt` for scripts that type it, each time a process of its own, but without a second and a half of imports.

A server is started once in every process of tests that asks for it. It imports what commands import, and forks for
every command that is typed: with the folder, the environment, the words and the three streams of whoever typed it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

# The `tlt` that is typed: it hands everything over, and waits for the exit code.
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    typed = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(typed).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(typed)
    code = server.recv(1)
sys.exit(code[0] if code else "tlt ended without a word")
"""


@cache
def quick() -> Path:
    """A folder in which `tlt` is for as long as this process lives: to stand first on the path of what it starts."""
    folder = Path(tempfile.mkdtemp(prefix="tlt-"))  # not pytest's, for a socket's address must be short
    (folder / "tlt").write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket")))
    (folder / "tlt").chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"warm\n"
    _SERVERS.append(server)
    return folder


_SERVERS: list[subprocess.Popen[bytes]] = []  # whose standard inputs end with this process, and they with these


def serve(folder: Path) -> None:
    """Until standard input ends."""
    import torch

    import tlt_cli.cli.compressing
    import tlt_cli.cli.gluing
    import tlt_cli.cli.slicing
    import tlt_cli.cli.training  # noqa: F401

    torch.optim.AdamW([torch.zeros(1)])  # imports what no module names
    with contextlib.suppress(ImportError):
        import matplotlib.figure  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "socket"))
        listening.listen()
        print("warm", flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            client, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                code = carried_out(client)
                client.sendall(bytes([code]))
                os._exit(code)
            client.close()
    shutil.rmtree(folder)


def carried_out(client: socket.socket) -> int:
    """In a child: what was typed, which ends where the one who typed it does. Returns its exit code."""
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    length, typed = int.from_bytes(size, "big"), b""
    while len(typed) < length:
        typed += client.recv(length - len(typed))
    threading.Thread(target=lambda: client.recv(1) or os.kill(os.getpid(), signal.SIGKILL), daemon=True).start()
    sys.argv, folder, environment = json.loads(typed)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    from tlt_cli.cli import main

    code = 1
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
