"""Two hosts without a batch system: every launcher's own way, and a cable that is pulled."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, wait_until
from tests.cluster.runs import events, same
from train import folder
from train.settings import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

STAGES = (1, 3)


@pytest.fixture(scope="module")
def one_host(cluster: Cluster, project: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs with both ranks on one host, a folder for each stage."""
    base = tmp_path_factory.mktemp("one-host")
    for stage in STAGES:
        line = ["torchrun", "--nproc-per-node=2", "--master-port=29501", "-m", "train.pretrain", *options]
        line += ["--out", str(base / str(stage)), "--ds-config", f"ds_configs/zero{stage}.json"]
        cluster.nodes[0].check("env", f"--chdir={project}", *line)
    return base


def on_both(cluster: Cluster, project: Path, *line: object) -> list[subprocess.Popen[bytes]]:
    """The same command on both nodes; {node} is the node's number."""
    log = project.parent / "launch.log"
    log.write_text("")
    return [
        node.start(
            "env", f"--chdir={project}", *(str(word).replace("{node}", str(number)) for word in line), log=log, GLOO_SOCKET_IFNAME="eth0"
        )
        for number, node in enumerate(cluster.nodes)
    ]  # fmt: skip


def ends(launchers: list[subprocess.Popen[bytes]], seconds: float = 120.0) -> list[int]:
    until = time.monotonic() + seconds
    return [launcher.wait(until - time.monotonic()) for launcher in launchers]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "accelerate"])
def test_twenty_steps_on_two_hosts_have_the_bits_of_one(
    cluster: Cluster, project: Path, options: list[str], one_host: Path, tmp_path: Path, launcher: str, stage: int
) -> None:
    out = tmp_path / "run"
    run = ["--out", out, "--ds-config", f"ds_configs/zero{stage}.json", *options]
    if launcher == "deepspeed":
        (project / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\n")
        hostfile = cluster.folder / "hostfile"
        line = ["deepspeed", "--hostfile", hostfile, "--module", "train.pretrain", *run]
        cluster.nodes[0].check("env", f"--chdir={project}", *line)
    elif launcher == "torchrun":
        meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29502", "--rdzv-id=a"]
        assert ends(on_both(cluster, project, "torchrun", *meet, "-m", "train.pretrain", *run)) == [0, 0]
    else:
        made = ["python", "-m", "train.accelerate_config", "--hosts", "node1", "node2", "--ranks-per-host", "1"]
        (project / "two-hosts.yaml").write_text(cluster.nodes[0].check("env", f"--chdir={project}", *made))
        line = ["accelerate", "launch", "--config_file", "two-hosts.yaml", "--machine_rank", "{node}", "--module"]
        assert ends(on_both(cluster, project, *line, "train.pretrain", *run)) == [0, 0]
    ended = folder.result(out)
    assert ended and ended["world"] == 2 and ended["step"] == 20
    assert same(out, one_host / str(stage))


def test_a_cable_that_is_pulled_ends_the_run_with_the_name_of_who_is_cut_off(
    cluster: Cluster, project: Path, options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    meet = ["--nnodes=2", "--nproc-per-node=1", "--node-rank={node}", "--master-addr=node1", "--master-port=29503"]
    line = ["torchrun", *meet, "-m", "train.pretrain", "--out", out, *options, "--steps", 100000, "--timeout", 8]
    launchers = on_both(cluster, project, *line)
    wait_until(lambda: out.exists() and len(folder.read_metrics(out)) > 20, 90, "steps")
    cluster.cut(cluster.nodes[1])
    try:
        assert all(ends(launchers, 120))
    finally:
        cluster.cut(cluster.nodes[1], False)
    said = (project.parent / "launch.log").read_text()
    assert re.search(
        r"^error: .*: rank 1 on node2 does not answer \(killed, stopped or cut off\)", said, re.MULTILINE
    ), said
    assert re.search(
        r"^error: .* on rank 1 on node2, and node1, where the ranks meet, can't be reached", said, re.MULTILINE
    )
    assert events(out)[-1]["event"] == "begins"


PLANTED = {
    "another version of a package": ("site", r"node2: Python and packages differ from node1's \(transformers 4\.0\.0 and 5"),
    "another code": ("code", r"node2: code of train/ and balanced_adam/ differ from node1's"),
    "a folder that isn't shared": ("out", r"node2: \S+ is not shared: what rank 0 wrote there is not to be seen"),
    "a cache that can't be written": ("cache", r"node2: \S+cache can't be written to \(Read-only file system\)"),
    "a disk that is too small": ("disk", r"node1: the disk of \S+ has 0\.0 GB free, and the checkpoints need 0\.0 GB more"),
    "a clock that is wrong": ("clock", r"its clock is more than 5 s away from the others'"),
    "a sum that is wrong": ("sum", r"node2: an all-reduce of known numbers gave wrong sums on rank 1"),
    "other settings": ("settings", r"node2: settings differ from node1's"),
}  # fmt: skip
SITECUSTOMIZE = {
    "clock": "import time\nright = time.time\ntime.time = lambda: right() + 3600",
    "sum": """
import sys
class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "train.preflight" or (name == "train.checkpoints" and "preflight" in " ".join(sys.argv)):
            import torch.distributed as dist
            right = dist.all_reduce
            def wrong(tensor, *a, **k):
                done = right(tensor, *a, **k)
                if tensor.numel() > 1000: tensor[7] += 1
                return done
            dist.all_reduce = wrong
sys.meta_path.insert(0, Late())
""",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_preflight_names_the_host_with_a_planted_fault(
    cluster: Cluster, project: Path, options: list[str], tmp_path: Path, fault: str
) -> None:
    kind, expected = PLANTED[fault]
    node2 = cluster.nodes[1]
    out, hidden, cache = tmp_path / "run", tmp_path / "hidden", tmp_path / "cache"
    for place in (out, hidden, cache):
        place.mkdir()
    mounted: list[tuple[object, object]] = []

    def mount(node: object, *line: object) -> None:
        node.check("mount", *line)  # type: ignore[attr-defined]
        mounted.append((node, line[-1]))

    more = ""
    if kind == "site":
        about = hidden / "transformers-4.0.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
        more = str(hidden)
    elif kind == "code":
        (hidden / "rule.py").write_text((project / "balanced_adam" / "rule.py").read_text() + "\n# changed\n")
        mount(node2, "--bind", hidden / "rule.py", project / "balanced_adam" / "rule.py")
    elif kind == "out":
        mount(node2, "--bind", hidden, out)
    elif kind == "cache":
        mount(node2, "--bind", cache, cache)
        node2.check("mount", "-o", "remount,ro,bind", cache)
    elif kind == "disk":
        for node in cluster.nodes:
            mount(node, "-t", "tmpfs", "-o", "size=1m", "tmpfs", out)
    elif kind in SITECUSTOMIZE:
        (hidden / "sitecustomize.py").write_text(SITECUSTOMIZE[kind])
        more = str(hidden)
    log = tmp_path / "log"
    try:
        launchers = []
        for number, node in enumerate(cluster.nodes):
            meet = [
                "--nnodes=2",
                "--nproc-per-node=1",
                f"--node-rank={number}",
                "--master-addr=node1",
                "--master-port=29504",
            ]
            settings = [*options, "--data-cache", cache, *(["--lr", "0.5"] if kind == "settings" and number else [])]
            line = ["torchrun", *meet, "-m", "train.preflight", "--out", out, *settings]
            extra = {"PYTHONPATH": more} if number and more else {}
            launchers.append(
                node.start("env", f"--chdir={project}", *line, log=log, GLOO_SOCKET_IFNAME="eth0", **extra)
            )
        assert all(ends(launchers))
    finally:
        for node, place in reversed(mounted):
            node.check("umount", place)  # type: ignore[attr-defined]
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(expected, errors[0]), log.read_text()[-3000:]


def test_a_checkpoint_that_a_host_sees_late_is_waited_for(
    cluster: Cluster, project: Path, options: list[str], tmp_path: Path
) -> None:
    out, stale = tmp_path / "run", tmp_path / "stale"
    stale.mkdir()
    meet = ["--nnodes=2", "--nproc-per-node=1", "--node-rank={node}", "--master-addr=node1", "--master-port=29505"]
    line = ["torchrun", *meet, "-m", "train.pretrain", "--out", out, *options]
    assert ends(on_both(cluster, project, *line)) == [0, 0]
    (out / "result.json").unlink()
    node2 = cluster.nodes[1]
    node2.check("mount", "--bind", stale, out / "checkpoints")
    launchers = on_both(cluster, project, *line)
    log = project.parent / "launch.log"
    time.sleep(15)  # by then both wait
    assert "Going on from" not in log.read_text() and all(launcher.poll() is None for launcher in launchers)
    node2.check("umount", out / "checkpoints")
    assert ends(launchers) == [0, 0]
    assert "Going on from" in log.read_text() and f"{REPOSITORY}" != str(project)
