#!/usr/bin/env bash
# One binary serves every torch from 2.11 on: build the wheel under this environment's torch, then
# run the very same files under an older one. Run by hand (`make abi-check`): it downloads a torch.
#   PYTHON      interpreter with the newer torch and the build tools   (python3)
#   OLD_TORCH   the older version                                      (2.11.0)
#   OLD_PYTHON  interpreter that has it already, instead of a download
#   WORK        where the environments go, kept for the next run       (build/abi-check)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(command -v "${PYTHON:-python3}")
PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
OLD_TORCH=${OLD_TORCH:-2.11.0}
WORK=${WORK:-build/abi-check}
mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)

rm -rf "$WORK/wheel" "$WORK/new" "$WORK/old"
"$PYTHON" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$WORK/wheel" .
wheel=$(echo "$WORK"/wheel/hybridops-*.whl)
echo "wheel: $(basename "$wheel")"

if [[ -z "${OLD_PYTHON:-}" ]]; then
  OLD_PYTHON=$WORK/venv-$OLD_TORCH/bin/python
  [[ -x $OLD_PYTHON ]] || "$PYTHON" -m venv "$WORK/venv-$OLD_TORCH"
  "$OLD_PYTHON" -m pip install --quiet "torch==$OLD_TORCH" numpy
fi

cat > "$WORK/probe.py" <<'PY'
import hashlib
import sys

import torch

import hybridops
from hybridops import backend

path = backend.library()
assert path is not None, backend.why_no_library()
assert str(path).startswith(sys.argv[1]), f"{path} is not the wheel's library"
torch.manual_seed(0)
x, weight, bias = torch.randn(2, 1 + 5 * 9, 37), torch.randn(37, 1, 3, 3), torch.randn(37)
op = torch.ops.hybridops.peg.default
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
    y = hybridops.ops.peg(x, weight, bias, grid=(5, 9), prefix=1)
served = [event.key for event in profile.key_averages() if event.key.startswith("hybridops::")]
assert served, "the call did not reach the library"
with hybridops.use("reference"):
    expected = hybridops.ops.peg(x, weight, bias, grid=(5, 9), prefix=1)
torch.testing.assert_close(y, expected)
digest = hashlib.sha256(path.read_bytes()).hexdigest()
print(f"torch {torch.__version__}: {path.name} sha256 {digest[:16]}: {op} {served} matches its reference")
PY

# The wheel alone, unpacked beside each torch: neither run can see the source tree.
for side in new old; do
  python=$PYTHON
  [[ $side == old ]] && python=$OLD_PYTHON
  "$python" -m pip install --quiet --no-deps --target "$WORK/$side" "$wheel"
  (cd "$WORK" && PYTHONPATH="$WORK/$side" "$python" -P probe.py "$WORK/$side")
done
cmp "$WORK"/new/hybridops/_cpu_avx2.so "$WORK"/old/hybridops/_cpu_avx2.so
cmp "$WORK"/new/hybridops/_cpu_avx512.so "$WORK"/old/hybridops/_cpu_avx512.so
echo "one binary, both versions"
