"""Two hosts without a batch system: every launcher's own way, and a cable that is pulled."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, wait_until
from tests.cluster.runs import events, same
from train.common.files import REPOSITORY
from train.run import run_dir
from train.run.metrics import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]

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
    started = []
    for number, node in enumerate(cluster.nodes):
        words = [str(word).replace("{node}", str(number)) for word in line]
        started.append(node.start("env", f"--chdir={project}", *words, log=log, GLOO_SOCKET_IFNAME="eth0"))
    return started


def ends(launchers: list[subprocess.Popen[bytes]], seconds: float = 600.0) -> list[int]:
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
    ended = run_dir.result(out)
    assert ended and ended["world"] == 2 and ended["step"] == 20
    assert same(out, one_host / str(stage))


def test_a_cable_that_is_pulled_ends_the_run_with_the_name_of_who_is_cut_off(
    cluster: Cluster, project: Path, options: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    meet = ["--nnodes=2", "--nproc-per-node=1", "--node-rank={node}", "--master-addr=node1", "--master-port=29503"]
    line = ["torchrun", *meet, "-m", "train.pretrain", "--out", out, *options, "--steps", 100000, "--timeout", 20]
    launchers = on_both(cluster, project, *line)
    wait_until(lambda: out.exists() and len(read_metrics(out)) > 20, 600, "steps")
    cluster.cut(cluster.nodes[1])
    try:
        assert all(ends(launchers, 600))
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


PLANTED = [
    r"node2: Python and packages differ from node1's \(transformers 4\.0\.0 and 5",
    r"node2: code of train/ and balanced_adam/ differ from node1's",
    r"node2: settings differ from node1's",
    r"node2: an all-reduce of known numbers gave wrong sums on rank 1",
    r"node2: \S+cache can't be written to \(Read-only file system\)",
    r" and \S+run is not shared: what rank 0 wrote there is not visible",
    r"node1: the disk of \S+run has 0\.0 GB free, and the checkpoints need 0\.0 GB more",
    r"node.: its clock is more than 5 s away from the others'",
]
# What Python runs on its start on node 2: a clock that is an hour ahead, and a network card that adds wrongly.
SITECUSTOMIZE = """
import sys, time
right_time = time.time
time.time = lambda: right_time() + 3600
class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "train.run.host_checks":
            import torch.distributed as dist
            right = dist.all_reduce
            def wrong(tensor, *arguments, **more):
                done = right(tensor, *arguments, **more)
                if tensor.numel() > 1000:
                    tensor[7] += 1
                return done
            dist.all_reduce = wrong
sys.meta_path.insert(0, Late())
"""


def test_preflight_names_the_host_for_each_of_eight_planted_faults(
    cluster: Cluster, project: Path, options: list[str], tmp_path: Path
) -> None:
    node2 = cluster.nodes[1]
    out, hidden, cache = tmp_path / "run", tmp_path / "hidden", tmp_path / "cache"
    for place in (out, hidden, cache):
        place.mkdir()
    about = hidden / "transformers-4.0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    (hidden / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (hidden / "rule.py").write_text((project / "balanced_adam" / "rule.py").read_text() + "\n# changed\n")
    rule = project / "balanced_adam" / "rule.py"
    node2.check("mount", "--bind", hidden / "rule.py", rule)
    node2.check("mount", "--bind", cache, cache)
    node2.check("mount", "-o", "remount,ro,bind", cache)
    for node in cluster.nodes:  # too small, and one each
        node.check("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", out)
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
            line = ["torchrun", *meet, "-m", "train.preflight", "--out", out, *options, "--data-cache", cache]
            more = {"PYTHONPATH": hidden} if node is node2 else {}
            lr = ["--lr", "0.5"] if node is node2 else []
            launchers.append(
                node.start("env", f"--chdir={project}", *line, *lr, log=log, GLOO_SOCKET_IFNAME="eth0", **more)
            )
        assert all(ends(launchers))
    finally:
        for node in cluster.nodes:
            node.check("umount", out)
        node2.check("umount", rule)
        node2.check("umount", cache)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, log.read_text()[-3000:]
    assert [fault for fault in PLANTED if not re.search(fault, errors[0])] == [], errors[0]


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
    assert "Resuming from" not in log.read_text() and all(launcher.poll() is None for launcher in launchers)
    node2.check("umount", out / "checkpoints")
    assert ends(launchers) == [0, 0]
    assert "Resuming from" in log.read_text() and f"{REPOSITORY}" != str(project)
