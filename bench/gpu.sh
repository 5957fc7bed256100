#!/usr/bin/env bash
# Runs everything that needs an NVIDIA GPU: GPU tests, sanitizer, benchmark.
#
#   bash bench/gpu.sh OUTDIR
#
# Installs nothing and needs no network: Python >= 3.10 with torch >= 2.9, triton >= 3.6 and pytest ($PYTHON, else
# python3); wheels in .whl/ of the repository's root are installed into a temporary folder. Each part has a time limit,
# together under nine minutes; a part that fails is recorded and the next one runs. OUTDIR gets log.txt, junit.xml, benchmark.json,
# memcheck.txt, racecheck.txt and summary.json. Exit status: 0, 1 if a part failed, 2 if nothing could be run.
set -uo pipefail

python=${PYTHON:-python3}

stop() {
    echo "gpu.sh: $*" >&2
    exit 2
}

[[ $# -eq 1 ]] || stop "one argument wanted, the directory for the results"
case $1 in /*) out=$1 ;; *) out=$PWD/$1 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || stop "Python >= 3.10 wanted: set PYTHON"
"$python" -c 'import pytest, torch, triton' || stop "torch, triton and pytest wanted where $python finds them"
"$python" -c 'import sys, torch; sys.exit(not (torch.cuda.is_available() and torch.version.cuda))' 2>/dev/null ||
    stop "no NVIDIA GPU that torch can use: nothing was run"

mkdir -p "$out" || stop "cannot write to $out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$scratch/triton # shared by the parts, so that kernels are compiled once
unset TRITON_INTERPRET

# part NAME LIMIT COMMAND...: runs it for at most LIMIT seconds and notes its exit status and its time
part() {
    local name=$1 limit=$2 start=$SECONDS rc
    shift 2
    echo "== $name, at most $limit s: $*"
    timeout --kill-after=3 "$limit" "$@"
    rc=$?
    echo "== $name: exit status $rc after $((SECONDS - start)) s"
    echo "$name $rc $((SECONDS - start))" >>"$scratch/parts"
}

absent() {
    echo "== $1: not run, $2"
    echo "$1 absent 0" >>"$scratch/parts"
}

main() {
    : >"$scratch/parts"
    if compgen -G '.whl/*.whl' >/dev/null; then
        part wheels 20 "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
            --disable-pip-version-check --target "$scratch/site" .whl/*.whl
    fi
    "$python" - <<'PY'
import importlib.util

wanted = "numpy hypothesis pytest_benchmark nvtx safetensors scipy cv2 PIL yaml tqdm tensorboard matplotlib".split()
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
print("missing packages:", ", ".join(missing) or "none")
PY
    describe
    part tests 190 "$python" -m pytest -m gpu tests/kernels --continue-on-collection-errors -ra --durations=10 \
        -p no:cacheprovider --junitxml="$out/junit.xml"
    if command -v compute-sanitizer >/dev/null; then
        part compile 45 "$python" -m bench.sanitize # compiles outside the sanitizer
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # one allocation per tensor, whose bounds memcheck checks
        part memcheck 40 compute-sanitizer --tool memcheck --error-exitcode 9 --log-file "$out/memcheck.txt" \
            "$python" -m bench.sanitize
        part racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 9 --log-file "$out/racecheck.txt" \
            "$python" -m bench.sanitize
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
        tail -n 3 "$out"/{mem,race}check.txt
    else
        absent memcheck "compute-sanitizer is not on PATH"
        absent racecheck "compute-sanitizer is not on PATH"
    fi
    # What decides the algorithm in kernels/tables.json, without peers; the whole suite takes longer than all the rest.
    local ours="ours-columns or ours-fused"
    local sizes="768-7880-16/3/1/4 or 768-40960-16/3/1/4 or 768-7880-64/12/4/1 or 768-40960-64/12/4/1"
    part benchmark 170 "$python" -m pytest bench/ --benchmark-only --benchmark-json="$out/benchmark.json" \
        --benchmark-max-time=0.4 -k "($ours) and ($sizes) or bench_product or training" -p no:cacheprovider
    describe "$out/summary.json"
    ! grep -qvE ' (0|absent) ' "$scratch/parts"
}

# Prints machine, versions, commit and finished parts as JSON; with an argument it also writes them to that file.
describe() {
    "$python" - "$scratch/parts" "$@" <<'PY'
import json
import platform
import subprocess
import sys

import torch
import triton


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


lines = [line.split() for line in open(sys.argv[1])]
status = {name: None if rc == "absent" else int(rc) for name, rc, _ in lines}
commit = output("git", "rev-parse", "HEAD") or "unknown"
summary = {
    "gpu": torch.cuda.get_device_name(),
    "capability": ".".join(map(str, torch.cuda.get_device_capability())),
    "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
    "machine": platform.platform(),
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "triton": triton.__version__,
    "commit": commit + (" with changes" if output("git", "status", "--porcelain") else ""),
    "parts": {name: {"rc": status[name], "seconds": int(seconds)} for name, _, seconds in lines},
}
text = json.dumps(summary, indent=1)
print(text)
if len(sys.argv) > 2:
    with open(sys.argv[2], "w") as file:
        file.write(text + "\n")
PY
}

main 2>&1 | tee "$scratch/log.txt"
rc=${PIPESTATUS[0]}
tail -c 15M "$scratch/log.txt" >"$out/log.txt"
for file in "$out"/{mem,race}check.txt; do # no file above 16 MiB
    if [[ -f $file && $(stat -c %s "$file") -gt 15000000 ]]; then
        tail -c 15000000 "$file" >"$scratch/end" && mv "$scratch/end" "$file"
    fi
done
exit "$rc"
