#!/usr/bin/env bash
# Fine-tunes: launch/finetune.sh RECIPE [--field value ...], on this machine or others, in all the ways of launch/pretrain.sh.
SPIKELM_COMMAND=finetune exec "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh" "$@"
