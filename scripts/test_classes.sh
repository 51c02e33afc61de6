#!/usr/bin/env bash
# Repeat the tests of the CPU kernels as other classes of processor run them; `make test-classes`.
#
# torch's own operators are held to a class by ATEN_CPU_CAPABILITY, the compiled kernel by KVQ_KERNEL_CFLAGS. Where this
# machine cannot run a class, a line says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:?the interpreter of an environment with pytest}
shift
# Programs for a GPU and graphs of torch.compile know no class of processor; the other file builds for each by itself.
tests=(tests/attention tests/encoding --ignore-glob='*triton*' --ignore-glob='*/test_compile.py' --ignore-glob='*/test_other_processors.py')

# run TITLE CAPABILITY VARIABLE=VALUE...: CAPABILITY is what torch must say of itself, or empty.
run() {
    local title=$1 capability=$2 found
    shift 2
    printf '\n-- %s\n' "$title"
    found=$(env "$@" "$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability())')
    if [ -n "$capability" ] && [ "$found" != "$capability" ]; then
        echo "torch computes as $found, not as $capability" >&2
        return 1
    fi
    env "$@" OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:xdist -p no:cacheprovider "${tests[@]}"
}

machine=$(uname -m)
if [ "$machine" = x86_64 ]; then
    if grep -qw avx2 /proc/cpuinfo; then
        run "x86-64 with AVX2" AVX2 ATEN_CPU_CAPABILITY=avx2 KVQ_KERNEL_CFLAGS=-march=x86-64-v3
    else
        echo "-- not tested: x86-64 with AVX2, which this processor lacks"
    fi
    run "any x86-64" DEFAULT ATEN_CPU_CAPABILITY=default KVQ_KERNEL_CFLAGS=-march=x86-64
else
    echo "-- not tested: the classes of x86-64, on a processor of $machine"
fi
run "no compiler" "" KVQ_CC=no-such-compiler CC=no-such-compiler
if ! command -v aarch64-linux-gnu-gcc >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    echo "-- not tested: aarch64, which wants aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu qemu-user)"
fi
