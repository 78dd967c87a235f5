#!/bin/sh
# Runs the tests of the C++ selective scan with the address and undefined-behaviour sanitizers built into it (GCC).
set -e
cd "$(dirname "$0")/.."
export CXX="${CXX:-g++}"
export CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g"
# The interpreter itself leaks by design; the sanitizers' libraries have to come before everything else.
export ASAN_OPTIONS=detect_leaks=0
LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libubsan.so)" \
    python -m pytest tests/kernels/scan/test_native.py tests/kernels/scan/test_selective_scan.py -k "not sequential and not associative" "$@"
