"""Write the configuration with which ``accelerate launch`` starts a run on several hosts.

``python -m train.accelerate_config --hosts node1 node2 --ranks-per-host 8 > two-hosts.yaml``, then on host number N
``accelerate launch --config_file two-hosts.yaml --machine_rank N --module train.pretrain ...``
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import yaml

from train.common.command_line import exit_code, parse
from train.common.errors import require
from train.common.files import REPOSITORY


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """The hosts, and the ranks on each."""

    hosts: tuple[str, ...]
    """Host names or addresses, each once. The ranks meet on the first."""
    ranks_per_host: int = 8
    """Ranks on each host; at least 1, normally one per GPU."""
    port: int = 29500
    """A TCP port that is free on the first host, in [1024, 65536)."""


def configuration(hosts: Hosts) -> str:
    """Return ds_configs/accelerate.yaml adapted to these hosts, as YAML.

    Raises:
        ConfigError: if a value is out of range.
    """
    require(len(set(hosts.hosts)) == len(hosts.hosts) > 0, f"hosts is {' '.join(hosts.hosts)}; give each once.")
    for host in hosts.hosts:
        require(
            re.fullmatch(r"[A-Za-z0-9._:\[\]-]+", host) is not None and not host.startswith("-"),
            f"hosts has {host!r}, which is neither a host name nor an address.",
        )
    require(hosts.ranks_per_host >= 1, f"ranks_per_host is {hosts.ranks_per_host}; it must be at least 1.")
    require(1024 <= hosts.port < 65536, f"port is {hosts.port}; it must lie in [1024, 65536).")
    shipped = yaml.safe_load((REPOSITORY / "ds_configs" / "accelerate.yaml").read_text())
    more = {
        "num_machines": len(hosts.hosts),
        "num_processes": len(hosts.hosts) * hosts.ranks_per_host,
        "main_process_ip": hosts.hosts[0],
        "main_process_port": hosts.port,
        "rdzv_backend": "static",
        "same_network": True,
    }
    # torchrun runs on each host. DeepSpeed's own launcher would start the other hosts from the first.
    shipped["deepspeed_config"]["deepspeed_multinode_launcher"] = "standard"
    text: str = yaml.safe_dump({**shipped, **more}, sort_keys=False)
    return text


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit code."""
    return exit_code(lambda: print(configuration(parse(Hosts, arguments, "train.accelerate_config", __doc__)), end=""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
