#!/usr/bin/env bash
# Check and measure the GPU kernels on a bare machine: Python with torch, triton, numpy and safetensors is all it needs.
#   bench/gpu.sh [--only tune|kernels|micro|grid|step|decode|memory] [--out FOLDER] [--fresh] [--tiny]
#   PYTHON=python3.12   the interpreter to use
# --only tune, until nothing is left, makes the rest measure what a user has after `peftdyno tune`.
# Each section ends in under eight minutes; called again, it goes on with the rows that are left.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/peftdyno"
for name in engine kernels bench; do
  ln -s "$root/$name" "$tree/peftdyno/$name"
done
PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -P -m peftdyno.bench.gpu "$@"
