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

# words and recordings of all voices, then the base: words first, then short sentences with recordings as references, then
# all sentences
words=$out/words codec=$out/codec/native
[ -f "$words/references.jsonl" ] || "$python" examples/miniature/coded_words.py --audio_tokenizer_path "$codec" \
    --out "$words" --takes 4 --voices slt rms awb amal karim huda nour zayd
[ -d "$out/base-untrained" ] || "$python" examples/miniature/make_base.py --audio_tokenizer_path "$codec" \
    --out "$out/base-untrained"
compose() {
    [ -f "$out/$1/speech.jsonl" ] || "$python" examples/miniature/compose.py --model_path "$out/base-untrained" \
        --audio_tokenizer_path "$codec" --words "$words" --out "$out/$1" "${@:2}"
}
train_base() {
    "$python" -m higgs_tune.train --config examples/miniature/base.yaml --model_path "$out/$1" \
        --train_data_dir "$out/$2/shards" --output_dir "$out/$3" "${@:4}"
}

# the recogniser goes on with decoded sentences among the rest
compose decoded --samples 64 --held_out 0 --decoded 480 --voices slt rms awb amal karim huda nour zayd --seed 60
train_recogniser --speech "$out/asr-wide" "$out/asr-narrow" "$out/decoded" --steps 7400 --learning_rate 4e-3

english=(--voices slt rms awb)
compose base-data-1 "${english[@]}" --samples 8000 --longest 3 --distinct --kinds words --word_references 1 --held_out 0 --seed 30
train_base base-untrained base-data-1 base-1 --tokens_per_pack 1024 --max_steps 600 --learning_rate 2e-3 \
    --head_learning_rate 2e-3 --train_on_reference true
compose base-data-2 "${english[@]}" --samples 12000 --longest 7 --held_out 0 --seed 40
train_base base-1 base-data-2 base-2 --tokens_per_pack 1536 --max_steps 800 --learning_rate 1.5e-3 \
    --head_learning_rate 1.5e-3
compose base-data-3 "${english[@]}" --samples 12000 --longest 14 --takes 2 --kinds words digits numbers digits numbers --seed 50
train_base base-2 base-data-3 base --tokens_per_pack 2048 --max_steps 600 --learning_rate 1e-3 \
    --head_learning_rate 1e-3 --lr_decay_fraction 0.6
