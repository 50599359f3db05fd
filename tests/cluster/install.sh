#!/usr/bin/env bash
# Debian and Ubuntu packages of the tests marked "cluster": a Slurm, ssh and namespaces. Starts no service. As root.
set -euo pipefail
# Keeps the packages' scripts from starting daemons where there is a systemd.
[ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d && trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge pdsh openssh-server openssh-client iproute2 util-linux >/dev/null
