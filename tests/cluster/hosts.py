"""Hosts in Linux namespaces on one machine, with ssh and a real Slurm: what tests of several nodes run on.

A host has a network, a hostname, mounts and a process tree of its own, all held by one process: killing that one is
pulling its plug. Hosts hang on a bridge inside the controller's namespace, so nothing is seen outside. Needs root.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from train.common.files import REPOSITORY

SUBNET = "10.99.0"
NAMESPACES = ["--net", "--uts", "--mount", "--ipc", "--pid"]
PACKAGES = ("slurmctld", "slurmd", "munged", "sbatch", "sshd", "pdsh", "unshare", "ip")
HOME = Path(pwd.getpwuid(os.geteuid()).pw_dir)
"""Where ssh looks for its files, whatever $HOME says."""
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """What this machine lacks, or None."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    if missing := [name for name in PACKAGES if not shutil.which(name, path=PATH)]:
        return f"needs {', '.join(missing)} (tests/cluster/install.sh)"
    if subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True).returncode:
        return "the kernel gives no namespaces"
    return None


def wait_until(holds: Callable[[], Any], seconds: float, what: str) -> None:
    """Raises TimeoutError if it doesn't come true."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.1)


class Host:
    """One host, up as long as its first process is."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.holder: subprocess.Popen[bytes] | None = None

    def up(self, bridge: Host | None) -> None:
        """Boot; plug it into the bridge of the controller, or be that."""
        hosts = f"{self.folder}/hosts"
        setup = (
            f"hostname {self.name}; mount --bind {hosts} /etc/hosts; ip link set lo up; echo up; exec sleep infinity"
        )
        flags = ["--fork", "--kill-child", "--mount-proc"]
        command = ["unshare", *NAMESPACES, *flags, "sh", "-c", setup]
        self.holder = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PATH": PATH},
        )
        assert self.holder.stdout and self.holder.stdout.readline() == b"up\n", f"{self.name} did not come up"
        self.pid = psutil.Process(self.holder.pid).children()[0].pid
        if bridge is None:
            self.check("ip", "link", "add", "br0", "type", "bridge")
            self.check("ip", "addr", "add", f"{self.address}/24", "dev", "br0")
            self.check("ip", "link", "set", "br0", "up")
        else:
            bridge.run("ip", "link", "del", self.cable)
            bridge_pid = ["nsenter", "-t", str(bridge.pid), "--net"]
            line = [
                *bridge_pid,
                "ip",
                "link",
                "add",
                self.cable,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                str(self.pid),
            ]
            subprocess.run(line, check=True, env={**os.environ, "PATH": PATH})
            bridge.check("ip", "link", "set", self.cable, "master", "br0", "up")
            self.check("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
            # The same after a reboot, or the others would go on talking to the old one for a while.
            self.check("ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{self.address.rsplit('.')[-1]}")
            self.check("ip", "link", "set", "eth0", "up")

    @property
    def cable(self) -> str:
        return f"v-{self.name}"

    def down(self) -> None:
        """Pull the plug: every process on it is gone at once."""
        if self.holder:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.holder.kill()
            self.holder.wait()
            self.holder = None

    def line(self, *command: Any) -> list[str]:
        """The command line that runs ``command`` on this host."""
        enter = ["nsenter", "-t", str(self.pid), *NAMESPACES, f"--wd={Path.cwd()}", "--"]
        return [*enter, *map(str, command)]

    def start(self, *command: Any, log: Path, **env: Any) -> subprocess.Popen[bytes]:
        """Start something; its output goes to a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.line(*command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=self.environment(env)
            )

    def run(self, *command: Any, timeout: float = 600.0, **env: Any) -> subprocess.CompletedProcess[str]:
        """Run something to its end."""
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": timeout}
        return subprocess.run(self.line(*command), env=self.environment(env), **pipes)

    def check(self, *command: Any, **more: Any) -> str:
        """Run something that has to succeed; what it printed."""
        done = self.run(*command, **more)
        assert done.returncode == 0, f"{self.name}: {command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def environment(self, more: dict[str, Any]) -> dict[str, str]:
        base = {
            "PATH": f"{Path(sys.executable).parent}:{PATH}",
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
        }
        slurm = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        return {**base, **slurm, "DS_ACCELERATOR": "cpu", **{k: str(v) for k, v in more.items()}}


class Cluster:
    """A controller and two nodes, with sshd on each and, if wanted, Slurm over them."""

    def __init__(self, folder: Path, slurm: bool = True) -> None:
        """Boot everything. ``folder``: short and readable by all, since munge's socket lies there."""
        self.folder, self.slurm = folder, slurm
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.controller = Host("ctl", f"{SUBNET}.1", folder)
        self.nodes = [Host(f"node{i}", f"{SUBNET}.{10 + i}", folder) for i in (1, 2)]
        self.all = [self.controller, *self.nodes]
        names = [f"{host.address} {host.name}\n" for host in self.all]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        try:
            self.controller.up(None)
            for node in self.nodes:
                node.up(self.controller)
            self._ssh()
            if slurm:
                self._slurm()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Pull all plugs."""
        for host in self.all:
            host.down()

    def node(self, name: str) -> Host:
        return next(host for host in self.all if host.name == name)

    def crash(self, node: Host) -> None:
        """A node loses its power."""
        node.down()

    def revive(self, node: Host) -> None:
        """And gets it back."""
        node.up(self.controller)
        self._sshd(node)
        if self.slurm:
            self._slurmd(node, "-b")
            self.wait_idle(node.name)

    def cut(self, node: Host, cut: bool = True) -> None:
        """Pull a node's network cable, or plug it in."""
        self.controller.check("ip", "link", "set", node.cable, "down" if cut else "up")

    def wait_idle(self, names: str = "node1,node2", seconds: float = 300.0) -> None:
        """Until Slurm would start a job on these nodes."""
        count = len(names.split(","))

        def idle() -> bool:
            said = self.controller.run("sinfo", "-h", "-N", "-p", "main", "-n", names, "-o", "%T").stdout.split()
            return said == ["idle"] * count

        wait_until(idle, seconds, f"{names} idle in Slurm")

    def _ssh(self) -> None:
        folder = self.folder / "ssh"
        folder.mkdir(mode=0o700)
        for name in ("id_ed25519", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "id_ed25519.pub", folder / "authorized_keys")
        key = (folder / "host_key.pub").read_text().rsplit(" ", 1)[0]
        (folder / "known_hosts").write_text("".join(f"{host.name},{host.address} {key}\n" for host in self.all))
        (folder / "config").write_text("Host *\n BatchMode yes\n StrictHostKeyChecking yes\n")
        for name in ("id_ed25519", "config"):
            (folder / name).chmod(0o600)
        settings = ["HostKey host_key", "AuthorizedKeysFile authorized_keys", "PermitRootLogin prohibit-password"]
        settings = [
            s.replace(" host_key", f" {folder}/host_key").replace(" authorized", f" {folder}/authorized")
            for s in settings
        ]
        settings += ["PasswordAuthentication no", "UsePAM no", "StrictModes no", "PidFile none", "MaxStartups 100"]
        (folder / "sshd_config").write_text("\n".join(settings) + "\n")
        Path("/run/sshd").mkdir(exist_ok=True)
        HOME.joinpath(".ssh").mkdir(mode=0o700, exist_ok=True)
        for host in self.all:
            self._sshd(host)
        (self.folder / "hostfile").write_text("".join(f"{node.name} slots=1\n" for node in self.nodes))

    def _sshd(self, host: Host) -> None:
        """The machine's own ~/.ssh is hidden by a mount inside the host, never changed."""
        sshd = shutil.which("sshd", path=PATH)
        ssh = self.folder / "ssh"
        script = f"mount --bind {ssh} {HOME}/.ssh; exec {sshd} -D -e -f {ssh}/sshd_config"
        host.start("sh", "-c", script, log=self.folder / f"sshd-{host.name}.log")
        if host is not self.controller:
            wait_until(lambda: self.controller.run("ssh", host.name, "true").returncode == 0, 15, f"ssh to {host.name}")

    def _slurm(self) -> None:
        here = self.folder
        for name in ("state", *(f"spool-{node.name}" for node in self.nodes)):
            (here / name).mkdir()
        (here / "munge.key").write_bytes(os.urandom(1024))
        (here / "munge.key").chmod(0o400)
        nodes = "\n".join(
            f"NodeName={node.name} NodeAddr={node.address} CPUs=64 RealMemory=8000 Gres=gpu:8" for node in self.nodes
        )
        (here / "slurm.conf").write_text(SLURM_CONF.format(here=here, address=self.controller.address, nodes=nodes))
        # GPUs that are nothing but devices to count, so that the shipped scripts run as they are.
        for number in range(8):
            os.mknod(here / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (here / "gres.conf").write_text(f"Name=gpu File={here}/gpu[0-7]\n")
        start, log = self.controller.start, here / "daemons.log"
        files = {"key": "munge.key", "pid": "munged.pid", "log": "munged.log", "seed": "munged.seed"}
        places = [f"--{kind}-file={here}/{name}" for kind, name in files.items()]
        start("munged", "--foreground", f"--socket={here}/munge.socket", *places, log=log)
        wait_until((here / "munge.socket").is_socket, 15, "munged")
        start("slurmctld", "-D", log=log)
        for node in self.nodes:
            self._slurmd(node)
        self.wait_idle()

    def _slurmd(self, node: Host, *more: str) -> None:
        node.start("slurmd", "-D", *more, "-N", node.name, log=self.folder / "daemons.log")


# No cgroups, no accounting, no binding; quick reactions, where Slurm's defaults are minutes.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=ctl({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={here}/munge.socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={here}/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool-%n
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd-%n.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd-%n.log
KillWait=30
SlurmdTimeout=10
BatchStartTimeout=10
MessageTimeout=10
UnkillableStepTimeout=60
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE OverSubscribe=NO PriorityTier=9 PreemptMode=off State=UP
"""


def copy_of_project(target: Path, python: str = sys.executable, ranks: int = 1) -> Path:
    """The project as a user has it, with site.env filled in as slurm/README.md says."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "runs", ".*cache", ".hypothesis", "build", "*.egg-info", "__pycache__"
    )
    shutil.copytree(REPOSITORY, target, ignore=ignore)
    site = target / "slurm" / "site.env"
    text = site.read_text()
    for name, value in {"PYTHON": python, "RANKS_PER_NODE": ranks, "export GLOO_SOCKET_IFNAME": "eth0"}.items():
        lines = text.splitlines()
        (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}=")]
        lines[at] = f"{name}={value}"
        text = "\n".join(lines) + "\n"
    site.write_text(text)
    return target
