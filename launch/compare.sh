#!/usr/bin/env bash
# What neurons are worth: launch/compare.sh PRETRAINING FINE_TUNING [--field value ...], two recipes; fields are the latter's.
#   launch/compare.sh launch/recipes/demo.yaml launch/recipes/finetune/own.yaml --task.train reviews.csv
# Pretrains the ordinary twin, the released neuron, ours at T=1 and T=4, and lif alike; fine-tunes each alike, and once more from
# random weights; writes compare.md and compare.png to $OUTPUT (runs/compare), where the runs are. The same line goes on.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
[ $# -ge 2 ] && [ -f "$1" ] && [ -f "$2" ] || { echo "usage: launch/compare.sh PRETRAINING FINE_TUNING [--field value ...]" >&2; exit 2; }
pretraining=$1 tuning=$2
shift 2
output=${OUTPUT:-runs/compare}

variants=()
compare() { # NAME FOLDER [--field value ...] of the pretraining
    local name=$1 folder=$2
    shift 2
    launch/pretrain.sh "$pretraining" --name "$folder" --output "$output" "$@"
    for start in tuned scratch; do
        launch/finetune.sh "$tuning" --name "$folder-$start" --output "$output" --model.start "$output/$folder" \
            --model.from_scratch "$([ $start = scratch ] && echo true || echo false)" "${fields[@]}"
    done
    variants+=(--variant "$name" "$output/$folder" "$output/$folder-tuned" "$output/$folder-scratch")
}

fields=("$@")
compare "ordinary" ordinary --model.neuron.kind none
compare "released, T=4" released --model.neuron.preset released
compare "ours, T=1" ours-1 --model.neuron.num_timesteps 1
compare "ours, T=4" ours-4 --model.neuron.num_timesteps 4
compare "lif, T=4" lif --model.neuron.kind lif --model.neuron.num_timesteps 4
python -m pipeline.compare "${variants[@]}" --output "$output"
