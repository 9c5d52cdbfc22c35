#!/bin/bash
# Make the miniature anew: examples/miniature/make.sh [FOLDER], by default runs/miniature. Needs flite and espeak-ng.
# Started again, finished steps are skipped and trainings go on from their last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.." # names are from the root of the repository
out=${1:-runs/miniature}
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
speech() { [ -f "$out/$1/speech.jsonl" ] || "$python" examples/miniature/speech.py --out "$out/$1" "${@:2}"; }

# codec: on all voices and kinds of sentences, then on the base's domain, then the decoder alone
speech codec-wide --minutes 4
speech codec-narrow --minutes 10 --voices slt rms amal karim --kinds digits numbers --seed 3
"$python" examples/miniature/train_codec.py --speech "$out/codec-wide" --out "$out/codec" --steps 1500 --decay 0
"$python" examples/miniature/train_codec.py --speech "$out/codec-narrow" --out "$out/codec" --steps 2100 --decay 0
"$python" examples/miniature/train_codec.py --speech "$out/codec-narrow" --out "$out/codec" --steps 8000 --decay 0.6 --decoder_only

# recogniser
speech asr-speech --minutes 10 --seed 1
"$python" examples/miniature/train_recogniser.py --speech "$out/asr-speech" --out "$out/recogniser"

# base
speech base-speech --minutes 100 --voices slt rms --kinds digits numbers --seed 2
"$python" examples/miniature/base_data.py --speech "$out/base-speech"
[ -d "$out/base-untrained" ] || "$python" examples/miniature/make_base.py --out "$out/base-untrained"
"$bin/higgs-preprocess" --data "$out/base-speech/chatml.jsonl" --out "$out/base-shards" \
    --model_path "$out/base-untrained" --audio_tokenizer_path "$out/codec/native" --val_fraction 0.02
"$python" -m higgs_tune.train --config examples/miniature/base.yaml --model_path "$out/base-untrained" \
    --train_data_dir "$out/base-shards" --output_dir "$out/base"
