#!/usr/bin/env bash
# Writes requirements/cpu.txt anew from pyproject.toml (needs uv). torch itself, and what only its CUDA builds need,
# is left out: scripts/bootstrap.py says why. torch's PyPI build stands in while resolving, for its metadata alone.
set -euo pipefail
cd "$(dirname "$0")/.."
supported="python_full_version < '3.13' and ((platform_machine == 'aarch64' and sys_platform == 'linux') or (platform_machine == 'x86_64' and sys_platform == 'linux'))"
uv pip compile pyproject.toml --extra cpu --extra dev --universal --python-version 3.11 --quiet "$@" \
  --override <(echo "torch==2.13.0") --no-header --no-annotate \
  | grep -vE '^(torch|torchvision|torchaudio|torchcodec|nvidia-|cuda-)' \
  | sed "s/ ; $supported\$//" > requirements/cpu.txt
