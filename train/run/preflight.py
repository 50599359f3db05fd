"""The checks of :mod:`train.preflight`, in order."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from balanced_adam import kernels
from train.common.errors import ConfigError
from train.common.files import REPOSITORY, environment_facts
from train.data import tokenization
from train.data.sources import Sources
from train.distributed.launch import join
from train.run import deepspeed_config, documents, model, run_dir
from train.run.config import Preflight
from train.run.host_checks import (
    check_clocks,
    check_disk,
    check_folders,
    check_gpu,
    complaint,
    differences,
    digest_of_sources,
    gpu_name,
    measure_all_reduce,
)

TIMEOUT = 60.0  # seconds for the ranks to meet, and for any collective here


def preflight(run: Preflight) -> str:
    """Check everything, and return a summary for the user.

    Raises:
        ConfigError: on all ranks, with a clause for each problem.
    """
    began = time.monotonic()
    run.check()
    gpus = torch.cuda.is_available()
    ranks = join(TIMEOUT)
    with ranks.watchdog.guard():
        with ranks.collective_errors():
            ds_config = deepspeed_config.resolve(run, run.ranks or ranks.world, gpus)
            if ranks.is_main:
                run_dir.check(run)
            tokenizer = tokenization.load_tokenizer(run.data.tokenizer)
            config = model.configuration(run.model, len(tokenizer), run.data.sequence_length)
            documents.end_of(run.data, tokenizer)
        # One rank on each host reads the text. This may take long the first time.
        read: list[str] = []
        job = (lambda: read.append(Sources.of(run.data).fingerprint(tokenizer))) if ranks.local_rank == 0 else None
        ranks.wait_for(job)
        of_hosts = {host: text for host, text in ranks.gather((platform.node(), read[0] if read else "")) if text}
        text = of_hosts.get(platform.node(), "")
        if run.ranks is not None:
            return f"preflight: settings, text and model are right for {run.ranks} ranks."
        hosts = ranks.gather(platform.node())
        wrong = [*differences(hosts, ranks.gather(_facts(run, ds_config, text, ranks.device)))]
        with torch.device("meta"):
            parameters = model.parameter_count(model.empty(config))
        speed, wrong_sum = measure_all_reduce(ranks)
        checks: list[Callable[[], str]] = [
            lambda: wrong_sum,
            lambda: check_folders(ranks, run),
            lambda: check_disk(run, parameters) if ranks.is_main else "",
            lambda: check_gpu(ranks.device),
        ]
        for check in checks:
            complaints = ranks.gather(complaint(check))
            wrong += [f"{hosts[rank]}: {problem}" for rank, problem in enumerate(complaints) if problem]
        skew = check_clocks(ranks, hosts, wrong)
        with ranks.collective_errors():
            if ranks.is_main:
                shutil.rmtree(run.out / ".preflight", ignore_errors=True)
                if wrong:
                    raise ConfigError("; ".join(dict.fromkeys(wrong)) + ".")
        ranks.watchdog.end()
    host_count = len(set(hosts))
    what = (
        f"{ranks.world} {'ranks' if ranks.world > 1 else 'rank'} on {host_count} host{'s' * (host_count > 1)}, "
        f"{parameters / 1e6:.1f} M parameters"
    )
    network = f"all-reduce {speed / 1e9:.2f} GB/s, clocks within {skew:.3f} s; " if ranks.world > 1 else ""
    return f"preflight: {what}; {network}nothing wrong found in {time.monotonic() - began:.0f} s."


def _facts(run: Preflight, ds_config: dict[str, Any], text: str, device: torch.device) -> dict[str, Any]:
    """Return what has to be the same on all ranks, by name; ``text`` is the fingerprint of text and tokenizer."""
    return {
        "Python and packages": {"python": sys.version.split()[0], **environment_facts()["packages"]},
        "code of train/ and balanced_adam/": digest_of_sources(REPOSITORY),
        "settings": hashlib.sha256(json.dumps([run.identity(), ds_config], sort_keys=True).encode()).hexdigest(),
        "text and tokenizer": text,
        "kernels": kernels.why_not(device) or "found",
        "GPUs": gpu_name(device),
    }
