#!/usr/bin/env bash
# Installs what the tests of this folder need, on Debian or Ubuntu, as root. The tests themselves install nothing.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# The fonts are for the Chinese page.
apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk
