#!/usr/bin/env bash
# The tests as other processors would run them: fewer instructions, other kernels. With the argument
# `whole` all default tests on two that differ most, else those marked `strict` on all. A test that
# asks for equal bits where only agreement is promised fails in one of these.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
jobs=${JOBS:-2}

# NumPy refuses to switch off what the processor does not have, so only that is named.
features() {
  "$python" - "$@" <<'END'
import sys
from numpy._core._multiarray_umath import __cpu_dispatch__ as known, __cpu_features__ as has
print(" ".join(name for name in known if has[name] and name.startswith(tuple(sys.argv[1:]))))
END
}

# try WHICH SETTING...: run the tests that a marker expression selects, with settings of libraries.
try() {
  local which=$1
  shift
  echo "$which: $*"
  env "$@" "$python" -m pytest -q -n "$jobs" --dist worksteal -m "$which" -p no:cacheprovider
}

default="not slow and not learning"
strict="strict and not slow"
avx512="AVX512 X86_V4"
avx2="$avx512 AVX2 FMA3 X86_V3"
# shellcheck disable=SC2086  (each word is a feature's name)
oldest=(NPY_DISABLE_CPU_FEATURES="$(features $avx2)" ATEN_CPU_CAPABILITY=default
  MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=Nehalem)
compatible=(NPY_DISABLE_CPU_FEATURES="$(features $avx512)" MKL_CBWR=COMPATIBLE)

if [ "${1:-}" = whole ]; then
  try "$default" "${compatible[@]}"
  try "$default" "${oldest[@]}"
  exit
fi

try "$strict" ATEN_CPU_CAPABILITY=default
try "$strict" ATEN_CPU_CAPABILITY=avx2
try "$strict" MKL_ENABLE_INSTRUCTIONS=AVX2
try "$strict" MKL_ENABLE_INSTRUCTIONS=SSE4_2
try "$strict" MKL_CBWR=COMPATIBLE
try "$strict" OPENBLAS_CORETYPE=Haswell
try "$strict" OPENBLAS_CORETYPE=Nehalem
try "$strict" NPY_DISABLE_CPU_FEATURES="$(features $avx512)"
try "$strict" NPY_DISABLE_CPU_FEATURES="$(features $avx2)" \
  ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem
