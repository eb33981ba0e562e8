#!/usr/bin/env bash
# Make a virtual environment in FOLDER with metarl, Meta-World and the MuJoCo that it pins.
set -euo pipefail
if [ $# -ne 1 ]; then
    echo "usage: bash scripts/setup_metaworld.sh FOLDER" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
"${PYTHON:-python3}" -m venv "$1"
# The versions tested elsewhere, but for MuJoCo's.
grep -v '^mujoco' "$root/constraints.txt" >"$1/constraints.txt"
"$1/bin/python" -m pip install --disable-pip-version-check -q \
    -c "$1/constraints.txt" -c "$root/constraints-metaworld.txt" -e "$root[dev]" metaworld
