#!/usr/bin/env bash
# What docs/performance.md lacks, on one GPU: tables as JSON and plots into a folder.
#   scripts/benchmark_gpu.sh OUT
set -euo pipefail
out=${1:?a folder for the results}
mkdir -p "$out"
bench="${PYTHON:-python} -m stts_lightning.benchmark device=cuda"
mvit="mvit_b16,mvit_b16:t0_0.9_s4_0.9,mvit_b16:t0_0.8_s4_0.9,mvit_b16:t0_0.6_s4_0.9"
$bench "models=[$mvit,torchvision:mvit_v1_b]" "batch=[1,8,32]" "precision=[32,bf16]" json="$out/mvit.json" plot="$out/mvit.png"
$bench "models=[$mvit,torchvision:mvit_v1_b]" "batch=[1,8,32]" "precision=[bf16]" "compile=[true,reduce-overhead]" json="$out/mvit_compiled.json" plot="$out/mvit_compiled.png"
$bench "models=[video_swin_b,video_swin_b:t0_0.6,torchvision:swin3d_b]" "batch=[1,8]" "precision=[32,bf16]" "compile=[false,true]" json="$out/swin.json" plot="$out/swin.png"
$bench what=training "models=[mvit_b16,mvit_b16:t0_0.6_s4_0.9]" "batch=[8]" "precision=[bf16]" "compile=[false,true]" json="$out/training.json"
$bench what=operator "models=[mvit_b16:t0_0.6_s4_0.9,video_swin_b:t0_0.6]" "batch=[8]" json="$out/operator.json"
