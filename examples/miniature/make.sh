#!/bin/bash
# Make the miniature anew: examples/miniature/make.sh [FOLDER], by default runs/miniature. Needs flite and espeak-ng.
# Started again, finished steps are skipped and trainings go on from their last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.." # names are from the root of the repository
out=${1:-runs/miniature}
python=${PYTHON:-.venv/bin/python}
speech() { [ -f "$out/$1/speech.jsonl" ] || "$python" examples/miniature/speech.py --out "$out/$1" "${@:2}"; }

train_codec() { "$python" examples/miniature/train_codec.py --out "$out/codec" "$@"; }

# codec: on all voices and kinds of sentences, on the base's domain, the decoder alone; then all of it again with a floor
# under which no burst and no f is lost, and the decoder alone
speech codec-wide --minutes 4
speech codec-narrow --minutes 10 --voices slt rms amal karim --kinds digits numbers --seed 3
wide=$out/codec-wide narrow=$out/codec-narrow
train_codec --speech "$wide" --steps 700 --decay 0 --floor 5e-4 --learning_rate 8e-4
train_codec --speech "$wide" --steps 1500 --decay 0 --floor 5e-4 --learning_rate 3e-4
train_codec --speech "$narrow" --steps 2100 --decay 0 --floor 5e-4
train_codec --speech "$narrow" --steps 3100 --decay 0 --floor 5e-4 --learning_rate 5e-4 --decoder_only
train_codec --speech "$narrow" --steps 7400 --decay 0.5 --floor 5e-4 --decoder_only
train_codec --speech "$wide" "$narrow" --steps 8300 --decay 0.06
train_codec --speech "$wide" "$narrow" --steps 9900 --decay 0 --learning_rate 5e-4 --decoder_only
train_codec --speech "$wide" "$narrow" --steps 10200 --decay 0.03 --learning_rate 3e-4 --decoder_only

# recogniser
speech asr-wide --minutes 10 --seed 1
speech asr-narrow --minutes 8 --kinds digits numbers time date --seed 4
train_recogniser() { "$python" examples/miniature/train_recogniser.py --out "$out/recogniser" "$@"; }
train_recogniser --speech "$out/asr-wide" --steps 4000
train_recogniser --speech "$out/asr-wide" "$out/asr-narrow" --steps 5900 --learning_rate 2e-3

# base
[ -d "$out/base-untrained" ] || "$python" examples/miniature/make_base.py --audio_tokenizer_path "$out/codec/native" \
    --out "$out/base-untrained"
[ -f "$out/base-data/speech.jsonl" ] || "$python" examples/miniature/compose.py --model_path "$out/base-untrained" \
    --audio_tokenizer_path "$out/codec/native" --out "$out/base-data"
"$python" -m higgs_tune.train --config examples/miniature/base.yaml --model_path "$out/base-untrained" \
    --train_data_dir "$out/base-data/shards" --output_dir "$out/base"
