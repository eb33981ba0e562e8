#!/usr/bin/env bash
# The tests marked `strict` as other processors would run them: fewer instructions, other kernels.
# A test that asks for equal bits where only agreement is promised fails in one of these.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

# NumPy refuses to switch off what the processor does not have, so only that is named.
features() {
  "$python" - "$@" <<'END'
import sys
from numpy._core._multiarray_umath import __cpu_dispatch__ as known, __cpu_features__ as has
print(" ".join(name for name in known if has[name] and name.startswith(tuple(sys.argv[1:]))))
END
}

try() {
  echo "strict: $*"
  env "$@" "$python" -m pytest -q -m "strict and not slow" -p no:cacheprovider
}

try ATEN_CPU_CAPABILITY=default
try ATEN_CPU_CAPABILITY=avx2
try MKL_ENABLE_INSTRUCTIONS=AVX2
try MKL_ENABLE_INSTRUCTIONS=SSE4_2
try MKL_CBWR=COMPATIBLE
try OPENBLAS_CORETYPE=Haswell
try OPENBLAS_CORETYPE=Nehalem
try NPY_DISABLE_CPU_FEATURES="$(features AVX512 X86_V4)"
try NPY_DISABLE_CPU_FEATURES="$(features AVX512 X86_V4 AVX2 FMA3 X86_V3)" \
  ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem
