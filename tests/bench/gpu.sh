#!/usr/bin/env bash
# Kernels against the reference on a GPU, then primitives, layer, step and a decoder of 1.4 B parameters in 24 GiB; raw
# figures are appended to results.csv. From the project's root, in an environment that has it installed. PEAK_TFLOPS_FP32
# and PEAK_TFLOPS_BF16, the device's, are what its maker says (unset: no MFU).
set -euo pipefail
python -m pytest -q tests/test_spike_ops.py tests/test_fused_activation.py
python -m tests.bench.bench_ops --rows 64 --record
for tokens in 128 512; do
    python -m tests.bench.bench_layer --rows 64 --tokens "$tokens" --record
done
for precision in fp32 bf16; do
    peak="PEAK_TFLOPS_${precision^^}"
    python -m tests.bench.bench_step --rows 64 --precision "$precision" ${!peak:+--peak-tflops "${!peak}"} --record
done
python -m tests.bench.bench_big --preset decoder-1.3b --overrides '{}' --tokens 512 --processes 1 \
    --ds_configs ds_configs/zero2_offload.json --device_gib 24
