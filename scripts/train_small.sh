#!/usr/bin/env bash
# The recipe of the built-in weights, stage by stage; made for one H200, whose figures stand in the model card.
#   scripts/train_small.sh data         render worlds in the background (they go on while the stages train)
#   scripts/train_small.sh text         the byte-pair encoding
#   scripts/train_small.sh tokenizer    the vision tokenizer        (TOKENIZER_S seconds)
#   scripts/train_small.sh pretrain     the transformer             (PRETRAIN_S seconds in all, on GPUS GPUs)
#   scripts/train_small.sh decoder      what draws the codes, trained on: they stay what they are, and the transformer of use
#                                       (DECODER_S seconds, after pretrain, into whose folder it goes)
#   scripts/train_small.sh dida         drawing pictures at once    (DIDA_S seconds in all, OWN_S of them for its own pictures,
#                                       from DIDA_FROM; into dida/)
#   scripts/train_small.sh detector     the detector of the suites  (DETECTOR_S seconds of training)
# To go on from weights: `pretrain init_from=FOLDER`; to grow them, `num_layers=16` behind it: the built-in weights were grown
# from 8 layers, and are the mean of two runs' (`emuworld convert average=[FOLDER,…]`, then `to=int8`).
# FIRST_SEED is that of the first training world: other worlds for a run that goes on from an earlier one's weights.
# All six modes are trained together. RENDERER (auto, gl, rays, cuda) draws; cuda leaves the GPU to the trainer.
# Stages resume after a kill. WORK is the folder for data and runs, EMUWORLD the command, PYTHON the interpreter
# that torchrun starts on each GPU; DEVICE=cpu COMPILE=false with small sizes behind the stage tries the recipe out.
set -euo pipefail
WORK=${WORK:-outputs/small}
EMUWORLD=${EMUWORLD:-./run emuworld}
TOKENIZER_S=${TOKENIZER_S:-330}
PRETRAIN_S=${PRETRAIN_S:-500}
DECODER_S=${DECODER_S:-400}
DIDA_S=${DIDA_S:-1000}
OWN_S=${OWN_S:-380}
STARTUP_S=${STARTUP_S:-12} # of DIDA_S, for starting Python and its imports
DIDA_FROM=${DIDA_FROM:-$WORK/pretrain}
DETECTOR_S=${DETECTOR_S:-100}
ROOMS=${ROOMS:-10000}
TABLES=${TABLES:-4000}
FIRST_SEED=${FIRST_SEED:-0}
WORKERS=${WORKERS:-6} # processes that draw rooms; TABLE_WORKERS: table-tops
TABLE_WORKERS=${TABLE_WORKERS:-3}
GPUS=${GPUS:-1}
PYTHON=${PYTHON:-./run python}
DEVICE=${DEVICE:-cuda}
COMPILE=${COMPILE:-true}
GRAPHS=${GRAPHS:-$COMPILE} # batches replayed as CUDA graphs
RENDERER=${RENDERER:-auto}
# What a room and what a table-top gives. Many table-tops told four times each, and not few told eight times: few are learnt
# by heart (docs/log.md).
ROOM_KINDS=${ROOM_KINDS:-num_frames=42 num_pictures=8 num_edits=20 num_tales=1 episodes_per_shard=4}
TABLE_KINDS=${TABLE_KINDS:-num_frames=0 num_pictures=0 num_tasks=1 num_views=4 num_tables=10 num_table_edits=18 episodes_per_shard=6}
# The rows of a step by kind and length: about 225,000 tokens, two fifths of them walks. Every bucket is some work for the
# processor, whatever its size, so few and large ones take part in a step. On several GPUs a step is as large as on one and
# takes less time: fewer buckets at once, each with as many rows for every GPU.
bucket() { # what, rows on one GPU, in each so many-th step
    printf ',{%s,batch_size:%d,every:%d}' "$1" $(($2 * GPUS)) $(($3 * GPUS))
}
BUCKETS="buckets=[{kind:walk,frames:12,batch_size:24}$(bucket kind:picture 132 2)$(bucket kind:x2i,frames:2 120 1)"
BUCKETS="$BUCKETS$(bucket kind:table 84 3)$(bucket kind:vla,frames:2 72 3)$(bucket kind:vla,frames:4,at_least:3 30 3)"
BUCKETS="$BUCKETS$(bucket kind:howto,frames:3 18 3)$(bucket kind:walk,frames:42 3 8)$(bucket kind:story,frames:6 12 4)"
BUCKETS="$BUCKETS$(bucket kind:x2i,frames:3 24 8)$(bucket kind:vla,frames:7,at_least:5 21 8)"
BUCKETS="$BUCKETS$(bucket kind:howto,frames:6,at_least:4 21 8)]"
DIDA_BUCKETS="buckets=[{kind:walk,frames:6,batch_size:8},{kind:picture,batch_size:32},{kind:table,batch_size:8}"
DIDA_BUCKETS="$DIDA_BUCKETS,{kind:x2i,frames:2,batch_size:24},{kind:story,frames:6,batch_size:6}"
DIDA_BUCKETS="$DIDA_BUCKETS,{kind:vla,frames:7,batch_size:4},{kind:howto,frames:6,batch_size:4,every:2}]"
PARALLEL="$EMUWORLD"
[ "$GPUS" = 1 ] || PARALLEL="$PYTHON -m torch.distributed.run --standalone --nproc-per-node $GPUS -m emuworld.cli"

build() { # split, folder, first seed, number of seeds, processes, what each gives: goes on when the script has ended
    setsid nohup $EMUWORLD data build out="$WORK/$1/$2" split="$1" first_seed="$3" num_episodes="$4" workers="$5" \
        renderer="$RENDERER" "${@:6}" >>"$WORK/data-$1-$2.log" 2>&1 </dev/null
}

case "${1:-}" in
data)
    mkdir -p "$WORK"
    for ((gpu = 0; gpu < GPUS; gpu++)); do # each draws its share
        export CUDA_VISIBLE_DEVICES=$gpu
        build train "rooms-$gpu" $((FIRST_SEED + gpu * ROOMS / GPUS)) $((ROOMS / GPUS)) $((WORKERS / GPUS)) $ROOM_KINDS &
        build train "tables-$gpu" $((100000 + FIRST_SEED + gpu * TABLES / GPUS)) $((TABLES / GPUS)) \
            $((TABLE_WORKERS / GPUS)) $TABLE_KINDS &
    done
    build validation rooms 0 48 4 $ROOM_KINDS format=PNG & VALIDATION=$!
    build validation tables 100000 24 2 $TABLE_KINDS format=PNG & wait $! $VALIDATION
    ;;
text)
    $EMUWORLD train stage=text shards="$WORK/train" out="$WORK/text" max_shards=32 wait_for_data_s=120 num_tokens=640
    ;;
tokenizer)
    $EMUWORLD train stage=tokenizer shards="$WORK/train" validation_shards="$WORK/validation" \
        out="$WORK/tokenizer" device="$DEVICE" compile="$COMPILE" frames_in_memory=300000 workers=6 follow_shards=true \
        wait_for_data_s=120 batch_size=32 compile_mode=reduce-overhead first_frames=800 loop.max_steps=1000000 \
        loop.max_seconds="$TOKENIZER_S" "${@:2}"
    ;;
pretrain)
    $PARALLEL train stage=pretrain shards="$WORK/train" validation_shards="$WORK/validation" \
        vision="$WORK/tokenizer" text="$WORK/text/text.tiktoken" out="$WORK/pretrain" device="$DEVICE" compile="$COMPILE" graphs="$GRAPHS" \
        loss_tokens=65536 workers=6 follow_shards=true loop.max_steps=1000000 loop.max_seconds="$PRETRAIN_S" \
        first_frames=30000 validate_every_steps=1000 validation_batches=1 loop.decay_fraction=0.5 mixture.change_weight=8 \
        mixture.own_codes=1 mixture.own_passes=2 \
        $BUCKETS "${@:2}"
    ;;
decoder)
    # Squared errors count for more than in the tokenizer's stage: nothing can be lost to codes any more.
    $EMUWORLD train stage=tokenizer init_from="$WORK/tokenizer" decoder_only=true shards="$WORK/train" \
        validation_shards="$WORK/validation" out="$WORK/decoder" device="$DEVICE" compile="$COMPILE" \
        frames_in_memory=120000 workers=3 follow_shards=true wait_for_data_s=120 batch_size=64 \
        compile_mode=reduce-overhead first_frames=800 kernel_learning_rate=1.2e-3 l1_weight=0.2 log_weight=0.1 \
        loop.max_steps=1000000 loop.max_seconds="$DECODER_S" loop.decay_fraction=0.6 "${@:2}"
    [ ! -e "$WORK/pretrain/config.json" ] || cp "$WORK/decoder"/vision.* "$WORK/pretrain"
    ;;
dida)
    # Walks, pictures, edits and tales as the model draws them, as each mode is drawn: a few passes follow one of its pictures
    # where they would be torn between all that a caption can mean. Other kinds as they are. Codes that pretraining has made
    # already are not made anew. Adapter of rank 32: 4.3 MB in 8 bits for 16 layers. `adapter_from=` a folder, or small, goes on with one.
    CODES=""
    compgen -G "$WORK/pretrain/tokens-train-*" >/dev/null && CODES="codes=$WORK/pretrain"
    $EMUWORLD train stage=dida init_from="$DIDA_FROM" shards="$WORK/train" out="$WORK/dida" device="$DEVICE" \
        compile="$COMPILE" workers=6 $CODES stories=both own_share=1 own.kinds=[walk,pictures,pictures-table,x2i,story] \
        own.batch=512 own.num_stories=1000000 own.max_seconds="$OWN_S" prepare_seconds=60 rank=32 noise.path=masked \
        learning_rate=2e-3 packing.tokens=4096 packing.rows=12 packing.rows_at_once=12 validation_batches=1 \
        validate_every_steps=200 loop.max_steps=1000000 loop.stage_seconds="$((DIDA_S - STARTUP_S))" loop.warmup_steps=40 \
        loop.decay_fraction=0.6 gpu_passes=8 $DIDA_BUCKETS "${@:2}"
    ;;
detector)
    $EMUWORLD train stage=detector out="$WORK/detector" vision="$WORK/tokenizer" device="$DEVICE" \
        training.max_seconds="$DETECTOR_S" "${@:2}"
    ;;
*)
    sed -n '2,19s/^# //p' "$0"
    exit 2
    ;;
esac
