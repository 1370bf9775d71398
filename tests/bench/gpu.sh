#!/usr/bin/env bash
# Kernels against the reference on a GPU, then primitives, layer and step, whose raw figures are appended to results.csv.
# From the project's root, in an environment that has it installed.
set -euo pipefail
python -m pytest -q tests/test_spike_ops.py
python -m tests.bench.bench_ops --rows 64 --record
for tokens in 128 512; do
    python -m tests.bench.bench_layer --rows 64 --tokens "$tokens" --record
done
for precision in fp32 bf16; do
    python -m tests.bench.bench_step --rows 64 --precision "$precision" --record
done
