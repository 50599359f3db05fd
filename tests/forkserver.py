"""A process that has imported everything a rank needs, and forks ranks: ``python -m tests.forkserver SOCKET``.

One for all workers of a test session (tests/ranks.py starts it), and for the ranks themselves, which must not fork: a
process that has run OpenMP or autograd can't be forked safely. So nothing here may, nor start a thread.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path

MODULES = (
    "deepspeed.ops",
    "transformers.modeling_utils",
    "transformers.models.byt5.tokenization_byt5",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "datasets",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "distutils.ccompiler",
    "typeguard",
    "tests.ranks",
    "train.checkpoint.resumable_run",
    "train.run.preflight",
)
"""Not what ranks run as ``__main__``, or it would be there twice: train.pretrain, checkpoint.universal, tests.job."""
LATE = ("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer")
"""What DeepSpeed imports when it is used; older ones have not got them all."""


def prepare() -> None:
    """Import it all, for this process's children."""
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        import_module(name)
    for name in LATE:
        with suppress(ModuleNotFoundError):
            import_module(name)
    # The first optimizer of a process imports torch._dynamo and all it needs, for more than two seconds.
    torch.optim.AdamW([torch.ones(1, requires_grad=True)])
    # Else each collection that DeepSpeed asks for (twice in an engine's life) would look through these modules again.
    gc.collect()
    gc.freeze()


def check(server: int) -> None:
    """That this process was forked from a ``server`` that was fit for it.

    Raises:
        RuntimeError: if it wasn't.
    """
    threads = len(list(Path(f"/proc/{server}/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"the fork server has {threads} threads; what it imports has used OpenMP or autograd")
    if missing := [name for name in MODULES if name not in sys.modules]:
        raise RuntimeError(f"the fork server has not imported {', '.join(missing)}")
    if os.getppid() != server or not gc.get_freeze_count():
        raise RuntimeError(f"process {os.getpid()} was not forked from the fork server {server}")


def serve(address: Path) -> None:
    """Fork for whoever connects and sends what to run, ``(function, argument)``.

    The child's number goes back at once, its exit code when it has ended. Ends with the session whose folder the socket
    is in.
    """
    from tests.ranks import end_with

    prepare()
    children: dict[int, Connection] = {}
    aside = address.with_name("forkserver-begins")  # it gets its name when it listens
    session = Path("/proc") / (address.parent / "owner").read_text()
    with (
        suppress(FileNotFoundError),
        Listener(str(aside), "AF_UNIX", backlog=64) as listener,
    ):  # it removes the first name
        aside.rename(address)
        door = listener._listener._socket  # type: ignore[attr-defined]  # what multiprocessing's own loops wait for
        while address.exists() and session.exists():
            ready = wait([door, *children.values()], 0.02)
            for child in [child for child, client in children.items() if client in ready]:
                kill(child)  # whoever started it has gone: a client says nothing more
            if door in ready:
                client = listener.accept()
                try:
                    function, argument = client.recv()
                except (EOFError, OSError):
                    continue
                if (child := os.fork()) == 0:
                    ends: list[Listener | Connection] = [listener, client, *children.values()]
                    for each in ends:
                        each.close()
                    end_with(function, argument)
                children[child] = client
                with suppress(OSError):
                    client.send(child)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                client = children.pop(ended[0])
                with suppress(OSError):  # nobody wants to know any more
                    client.send(os.waitstatus_to_exitcode(ended[1]))
                client.close()
    for child in children:
        kill(child)
    shutil.rmtree(address.parent, ignore_errors=True)  # what a killed session has left


def kill(child: int) -> None:
    """All of a program."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
