#!/usr/bin/env bash
# GRPO of the built-in model on one GPU, measured before and after on the held-out suites, part by part:
#   scripts/grpo_small.sh prompts      what is asked, with the simulator's truth   (no GPU; WORKERS processes)
#   scripts/grpo_small.sh before       the suites with the model that it begins from
#   scripts/grpo_small.sh train        the stage, GRPO_S seconds in all, its start and its end included
#   scripts/grpo_small.sh after        the suites with its result
#   scripts/grpo_small.sh page         before beside after on one page, with the rewards along the way   (no GPU)
#   scripts/grpo_small.sh              all five
# WORK is the folder of all, MODEL what it begins from (small, or a checkpoint folder), JUDGE the detector of
# the suites, REWARD_JUDGE that of the rewards (train another one, and the suites tell what has fooled it),
# EMUWORLD the command; settings behind a part go to it: grpo_small.sh train group=16.
# Prompts come from the training and validation splits, the suites ask in the test split. Afterwards lie in
# WORK: before/ and after/ (pages and figures with 95 % intervals), grpo/ (the model, grpo.log.jsonl with the
# reward by term), page/ (what got better, what got worse). What draws pictures at once belongs to the old
# weights: train it (stage=dida) afterwards.
# NUM prompts of each mode (NUM_T2I of t2i, NUM_X2I of x2i) are asked in training, HELD of each held out.
# DEVICE=cpu NUM=2 with a small MODEL and little behind train tries it out.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-outputs/grpo-small}
MODEL=${MODEL:-small}
JUDGE=${JUDGE:-emuworld/weights/small/detector.safetensors}
REWARD_JUDGE=${REWARD_JUDGE:-$JUDGE}
EMUWORLD=${EMUWORLD:-./run emuworld}
GRPO_S=${GRPO_S:-200}
STARTUP_S=${STARTUP_S:-12} # of GRPO_S, for starting Python and its imports
DEVICE=${DEVICE:-cuda}
NUM=${NUM:-256}
NUM_T2I=${NUM_T2I:-$NUM}
NUM_X2I=${NUM_X2I:-$NUM}
HELD=${HELD:-16}
WORKERS=${WORKERS:-0}
SUITES=${SUITES:-t2i x2i explore-twin}
REWARDS="rewards=[{name:objects,weight:1.0,low:0.0,high:1.0,model:'$REWARD_JUDGE'}"
REWARDS="$REWARDS,{name:likeness,weight:1.0,low:10.0,high:30.0},{name:edit,weight:1.0,low:0.0,high:1.0}]"

suites() { # where to, the model, settings
    for suite in $SUITES; do
        $EMUWORLD eval suite="$suite" device="$DEVICE" model="$2" detector="$JUDGE" out="$WORK/$1/$suite" "${@:3}"
    done
}

case "${1:-all}" in
prompts)
    $EMUWORLD data prompts out="$WORK/train" split=train num_t2i="$NUM_T2I" num_x2i="$NUM_X2I" num_explore="$NUM" \
        workers="$WORKERS" "${@:2}"
    $EMUWORLD data prompts out="$WORK/held" split=validation num_t2i="$HELD" num_x2i="$HELD" num_explore="$HELD" \
        workers="$WORKERS" "${@:2}"
    ;;
before)
    suites before "$MODEL" "${@:2}"
    ;;
train)
    $EMUWORLD train stage=grpo init_from="$MODEL" prompts="$WORK/train/prompts.jsonl" \
        held_out="$WORK/held/prompts.jsonl" out="$WORK/grpo" device="$DEVICE" "$REWARDS" prompts_per_step=32 \
        answers_at_once=256 rows_at_once=64 loss_tokens=65536 learning_rate=2.5e-5 embedding_learning_rate=1e-5 \
        temperature=0.8 least_spread=0.3 measure_every_steps=100 loop.max_steps=100000 loop.stage_seconds="$((GRPO_S - STARTUP_S))" loop.decay_fraction=0.5 \
        loop.save_every_s=90 "${@:2}"
    ;;
after)
    suites after "$WORK/grpo" "${@:2}"
    ;;
page)
    $EMUWORLD compare before="$WORK/before" after="$WORK/after" log="$WORK/grpo/grpo.log.jsonl" out="$WORK/page" "${@:2}"
    ;;
all)
    for part in prompts before train after page; do
        bash "$0" "$part"
    done
    ;;
*)
    sed -n '2,16s/^# //p' "$0"
    exit 2
    ;;
esac
