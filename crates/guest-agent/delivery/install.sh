#!/bin/sh
# Installs what fetches and starts the agent: run it from the mounted medium, as root, in a system with systemd.
set -eu
from=$(cd "$(dirname "$0")" && pwd)
[ -d /run/systemd/system ] || { echo "install.sh: this needs a running systemd" >&2; exit 1; }
[ -w /usr/lib ] || { echo "install.sh: /usr/lib cannot be written" >&2; exit 1; }
mkdir -p /usr/lib/karst-agent /etc/systemd/system /etc/udev/rules.d
cp "$from/karst-agent-setup" /usr/lib/karst-agent/setup
chmod 0755 /usr/lib/karst-agent/setup
cp "$from/karst-agent.service" /etc/systemd/system/karst-agent.service
cp "$from/99-karst-agent.rules" /etc/udev/rules.d/99-karst-agent.rules
chmod 0644 /etc/systemd/system/karst-agent.service /etc/udev/rules.d/99-karst-agent.rules
udevadm control --reload
systemctl daemon-reload
systemctl --no-block start karst-agent.service
