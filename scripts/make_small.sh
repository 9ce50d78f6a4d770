#!/usr/bin/env bash
# The built-in weights from nothing, in one command and in BUDGET_S seconds of one GPU: worlds are drawn while the
# stages of train_small.sh train, and the suites measure what came out.
#   BUDGET_S=1650 scripts/make_small.sh            INIT=FOLDER goes on from a transformer and its tokenizers
# A phase logs to WORK/log, its end to WORK/phases. What is worth keeping lies in WORK/ship as soon as there is any, in
# pieces of 15 MB: a machine that is lent may go at any time. Given again after a kill, it goes on where it was.
# On a machine that is lent: start it with setsid, and let something call the machine all the while (docs/log.md).
set -uo pipefail
cd "$(dirname "$0")/.."
export WORK=${WORK:-outputs/small} RENDERER=${RENDERER:-cuda} DEVICE=${DEVICE:-cuda} EMUWORLD=${EMUWORLD:-./run emuworld}
PYTHON=${PYTHON:-./run python}
BUDGET_S=${BUDGET_S:-1650}
INIT=${INIT:-}
export WORKERS=${WORKERS:-8} TABLE_WORKERS=${TABLE_WORKERS:-4}
SHIP=$WORK/ship
mkdir -p "$WORK/log" "$WORK/done" "$SHIP"

share() { echo $((BUDGET_S * $1 / 100)); } # so many hundredths of the seconds

phase() { # name, command: once; how it ended and when is told
    [ -e "$WORK/done/$1" ] && return
    local start=$SECONDS end
    "${@:2}" >>"$WORK/log/$1.log" 2>&1
    end=$?
    echo "$1: status $end after $((SECONDS - start)) s, at $SECONDS s" | tee -a "$WORK/phases"
    [ $end -eq 0 ] && touch "$WORK/done/$1"
    return $end
}

ship() { # a folder and some of its files, as pieces of a tar that appear whole
    tar cf "$WORK/part.tar" -C "$1" "${@:2}" && rm -f "$SHIP/$(basename "$1").tar."*
    (cd "$WORK" && split -b 15000000 -d part.tar "part-" && for piece in part-[0-9]*; do mv "$piece" "ship/$(basename "$1").tar.${piece#part-}"; done)
}

data() { nice -n 5 scripts/train_small.sh data; }

measured() { # model, stages
    OMP_NUM_THREADS=1 $PYTHON scripts/measure_small.py device="$DEVICE" renderer="$RENDERER" model="$1" stages="$2" \
        out="$WORK/measured" workers="$WORKERS"
}

phase data data &
until compgen -G "$WORK/train/tables-0/*.stories" >/dev/null; do sleep 1; done
if [ -n "$INIT" ]; then
    mkdir -p "$WORK/tokenizer" "$WORK/text"
    cp "$INIT"/vision.* "$WORK/tokenizer/" && cp "$INIT/text.tiktoken" "$WORK/text/" || exit 1
    TRAIN_S=$(share 60) FROM="init_from=$INIT"
else
    TRAIN_S=$(share 45) FROM=""
    phase text scripts/train_small.sh text &
    TOKENIZER_S=$(share 22) phase tokenizer scripts/train_small.sh tokenizer || exit 1
    ship "$WORK/tokenizer" vision.json vision.safetensors tokenizer.log.jsonl
fi
while [ ! -e "$WORK/done/data" ]; do sleep 1; done # of the validation split; the rest goes on
(sleep $((TRAIN_S * 6 / 10)); pkill -f "data build out=$WORK/train") & # the processor is the trainer's from then on
PRETRAIN_S=$TRAIN_S phase pretrain scripts/train_small.sh pretrain $FROM || exit 1
ship "$WORK/pretrain" config.json emuworld.json model.safetensors text.tiktoken pretrain.log.jsonl
phase detector scripts/train_small.sh detector renderer="$RENDERER" & DETECTOR=$!
DIDA_S=$(share 10) phase dida scripts/train_small.sh dida && ship "$WORK/dida" dida.safetensors emuworld.json dida.log.jsonl
wait $DETECTOR
cp "$WORK"/detector/detector.safetensors "$WORK/pretrain/" && cp "$WORK"/detector/detector.safetensors "$WORK/dida/"
ship "$WORK/detector" detector.safetensors
phase suites measured "$WORK/pretrain" explore,t2i,x2i,walks
phase passes measured "$WORK/dida" dida-t2i,dida-explore
phase pack $PYTHON scripts/measure_small.py out="$WORK/measured" stages=pack
cp "$WORK"/measured/*.tar.gz "$SHIP/"
echo "done at $SECONDS s: $SHIP"
