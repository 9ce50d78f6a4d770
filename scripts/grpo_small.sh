#!/bin/sh
# GRPO of the built-in model on one GPU, before and after on the held-out suites: one command, about 25 minutes.
#   scripts/grpo_small.sh                 WORK=folder, GRPO_S=seconds of training, DEVICE=cuda or cpu, extra
#                                         settings behind it: scripts/grpo_small.sh learning_rate=2e-5
# Prompts come from the training and validation splits, the suites ask in the test split. Afterwards lie in WORK:
# before/ and after/ (pages and figures with 95 % intervals), grpo/grpo.log.jsonl (reward by term, KL).
set -eu
cd "$(dirname "$0")/.."
WORK=${WORK:-outputs/grpo-small} GRPO_S=${GRPO_S:-720} DEVICE=${DEVICE:-cuda}
NUM=${NUM:-256} PROMPTS_PER_STEP=${PROMPTS_PER_STEP:-16}
EMUWORLD="./run emuworld"
$EMUWORLD data prompts out="$WORK/train" split=train num_t2i="$NUM" num_x2i="$NUM" num_explore="$NUM"
$EMUWORLD data prompts out="$WORK/held" split=validation num_t2i=16 num_x2i=16 num_explore=16
for suite in t2i explore-twin; do
    $EMUWORLD eval suite=$suite device="$DEVICE" out="$WORK/before/$suite"
done
$EMUWORLD train stage=grpo prompts="$WORK/train/prompts.jsonl" held_out="$WORK/held/prompts.jsonl" \
    out="$WORK/grpo" device="$DEVICE" prompts_per_step="$PROMPTS_PER_STEP" rows_at_once=32 \
    loop.max_steps=100000 loop.max_seconds="$GRPO_S" "$@"
for suite in t2i explore-twin; do
    $EMUWORLD eval suite=$suite device="$DEVICE" model="$WORK/grpo" \
        detector=emuworld/weights/small/detector.safetensors out="$WORK/after/$suite"
done
echo "before and after: $WORK/before $WORK/after; curves: $WORK/grpo/grpo.log.jsonl"
