#!/usr/bin/env bash
# Speed on one GPU, the most important first: Table 7 of the paper, forward passes, training steps, torch.compile, the operator,
# reducers on ViT-B beside MViTv2.
#   scripts/benchmark_gpu.sh OUT
# Writes tables as JSON and plots into OUT, and fills the part of docs/performance.md (PAGE=...) that is about a GPU. A step that
# fails or takes too long leaves the rows that it has, and the next one follows. All steps take 10 minutes at most.
#   SCALE=3 (default 1): times the time for each; SECONDS_EACH, ROUNDS: of each group of models that are timed in turns.
set -uo pipefail
out=${1:?a folder for the results}
python=${PYTHON:-python}
page=${PAGE-docs/performance.md}
device=${DEVICE:-cuda}
scale=${SCALE:-1}
mkdir -p "$out"
failed=0

# step NAME LIMIT ARGUMENTS...: one benchmark within LIMIT seconds.
step() {
  local name=$1 limit=$(($2 * scale)) start=$SECONDS code=0
  shift 2
  timeout -k 10 "$limit" "$python" -m stts_lightning.benchmark "device=$device" "seconds=${SECONDS_EACH:-1}" "rounds=${ROUNDS:-5}" \
    "json=$out/$name.json" "csv=$out/$name.csv" "$@" >"$out/$name.log" 2>&1 || code=$?
  [ "$code" = 0 ] || failed=1
  echo "$name: $((SECONDS - start)) s of $limit$([ "$code" = 0 ] || echo ", status $code: $(tail -n 1 "$out/$name.log")")"
}

mvit="mvit_b16,mvit_b16:t0_0.9_s4_0.9,mvit_b16:t0_0.6_s4_0.9,mvit_b16:t0_0.5_s4_0.7"
plain="plain:mvit_b16,plain:mvit_b16:t0_0.6_s4_0.9"
swin="video_swin_b,video_swin_b:t0_0.6,plain:video_swin_b,plain:video_swin_b:t0_0.6,torchvision:swin3d_b"
training="mvit_b16,mvit_b16:t0_0.6_s4_0.9,plain:mvit_b16:t0_0.6_s4_0.9,torchvision:mvit_v1_b"

reducers="vit_b,'vit_b:r0-11_65:selection.reducer=tome','vit_b:r3_0.7_r6_0.7_r9_0.7:selection.reducer=evit'"
reducers="$reducers,'vit_b:r0_0.5:selection.reducer=rlt','vit_b:r0_0.5:selection.reducer=random',vit_b:t0_0.5"

step 1_table7 60 what=table7 "batch=[${BATCH:-32}]" "precision=[bf16]" "plot=$out/1_table7.png"
step 2_mvit 100 "models=[$mvit,$plain,torchvision:mvit_v1_b]" "batch=[1,8,32]" "precision=[bf16,bf16-true]" "plot=$out/2_mvit.png"
step 3_video_swin 100 "models=[$swin]" "batch=[8,1]" "precision=[bf16,bf16-true]" "plot=$out/3_video_swin.png"
step 4_training 60 what=training "models=[$training]" "batch=[8]" "precision=[bf16]"
step 5_compile 120 "models=[mvit_b16,mvit_b16:t0_0.6_s4_0.9]" "batch=[8,1]" "precision=[bf16]" "compile=[reduce-overhead,true]"
step 6_operator 30 what=operator "models=[mvit_b16:t0_0.6_s4_0.9,video_swin_b:t0_0.6]" "batch=[8]"
step 7_reducers 90 "models=[$reducers,mvit_v2_s,mvit_v2_s:t0_0.6_s4_0.9]" "batch=[8,1]" "precision=[bf16]"
if [ -n "$page" ]; then
  "$python" "$(dirname "$0")/performance_page.py" "$out" "$page" || failed=1
fi
echo "all: $SECONDS s"
exit "$failed"
