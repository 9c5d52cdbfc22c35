#!/bin/bash
# Make the miniature anew: examples/miniature/make.sh [FOLDER], by default runs/miniature. Needs flite and espeak-ng.
# Started again, finished steps are skipped and trainings go on from their last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.." # names are from the root of the repository
out=${1:-runs/miniature}
python=${PYTHON:-.venv/bin/python}
speech() { [ -f "$out/$1/speech.jsonl" ] || "$python" examples/miniature/speech.py --out "$out/$1" "${@:2}"; }

train_codec() { "$python" examples/miniature/train_codec.py --out "$out/codec" "$@"; }

# codec: on all voices and kinds of sentences, on the base's domain, the decoder alone; then all of it again, and the decoder
# alone, for an hour at last by two processes on numbers, times and dates of all voices
speech codec-wide --minutes 4
speech codec-narrow --minutes 10 --voices slt rms amal karim --kinds digits numbers --seed 3
speech codec-domain --minutes 6 --kinds digits numbers time date --seed 200
speech codec-english --minutes 8 --voices slt rms awb --kinds digits numbers time date --seed 201
wide=$out/codec-wide narrow=$out/codec-narrow domain=("$out/codec-domain" "$out/codec-english" "$out/codec-narrow")
train_codec --speech "$wide" --steps 700 --decay 0 --learning_rate 8e-4
train_codec --speech "$wide" --steps 1500 --decay 0 --learning_rate 3e-4
train_codec --speech "$narrow" --steps 2100 --decay 0
train_codec --speech "$narrow" --steps 3100 --decay 0 --learning_rate 5e-4 --decoder_only
train_codec --speech "$narrow" --steps 7400 --decay 0.5 --decoder_only
train_codec --speech "$wide" "$narrow" --steps 8300 --decay 0.06
train_codec --speech "$wide" "$narrow" --steps 9900 --decay 0 --learning_rate 5e-4 --decoder_only
train_codec --speech "$wide" "$narrow" --steps 10200 --decay 0.03 --learning_rate 3e-4 --decoder_only
OMP_NUM_THREADS=1 "$(dirname "$python")/torchrun" --nproc_per_node 2 examples/miniature/train_codec.py --out "$out/codec" \
    --speech "${domain[@]}" --steps 15000 --decay 0.17 --learning_rate 5e-4 --decoder_only
train_codec --speech "${domain[@]}" --steps 17400 --decay 0.12 --learning_rate 4e-4 --decoder_only

# recogniser
speech asr-wide --minutes 10 --seed 1
speech asr-narrow --minutes 8 --kinds digits numbers time date --seed 4
train_recogniser() { "$python" examples/miniature/train_recogniser.py --out "$out/recogniser" "$@"; }
train_recogniser --speech "$out/asr-wide" --steps 4000
train_recogniser --speech "$out/asr-wide" "$out/asr-narrow" --steps 5900 --learning_rate 2e-3

# words and phrases of all voices, encoded; then the base: words first, then short sentences with recordings as references,
# then all sentences
words=$out/words codec=$out/codec/native
[ -f "$words/manifest.jsonl" ] || "$python" examples/miniature/word_clips.py --out "$words" --takes 4 \
    --voices slt rms awb amal karim huda nour zayd
[ -d "$out/base-untrained" ] || "$python" examples/miniature/make_base.py --audio_tokenizer_path "$codec" \
    --out "$out/base-untrained"
encode() {
    [ -f "$out/$1/shards/manifest.json" ] || "$(dirname "$python")/higgs-preprocess" --data "$out/$1/$2" \
        --out "$out/$1/shards" --model_path "$out/base-untrained" --audio_tokenizer_path "$codec" "${@:3}"
}
encode words manifest.jsonl --ref_drop 1 --min_seconds 0.1 --val_fraction 0
compose() {
    [ -f "$out/$1/speech.jsonl" ] || "$python" examples/miniature/compose.py --model_path "$out/base-untrained" \
        --audio_tokenizer_path "$codec" --words "$words" --word_shards "$words/shards" --out "$out/$1" "${@:2}"
}
launch=("$python")
train_base() {
    "${launch[@]}" -m higgs_tune.train --config examples/miniature/base.yaml --model_path "$out/$1" --output_dir "$out/$2" \
        --train_data_dir "${@:3}"
}

# the recogniser goes on with decoded sentences among the rest, of composed codes and then of recordings
compose decoded --samples 64 --held_out 0 --decoded 480 --voices slt rms awb amal karim huda nour zayd --seed 60
train_recogniser --speech "$out/asr-wide" "$out/asr-narrow" "$out/decoded" --steps 7400 --learning_rate 4e-3
speech asr-digits --minutes 6 --voices slt rms awb amal karim nour --kinds digits numbers --seed 90
speech asr-domain --minutes 9 --voices slt rms awb amal karim nour --kinds digits numbers time date --seed 91
train_recogniser --speech "$out/asr-wide" "$out/asr-narrow" "$out/decoded" "$out/asr-digits" \
    --through "$wide" "$out/asr-domain" --codec "$codec" --steps 9600 --learning_rate 4e-3
train_recogniser --speech "$out/asr-wide" "$out/asr-narrow" "$out/decoded" "$out/asr-digits" \
    --through "$out/asr-domain" --codec "$codec" --steps 13000 --learning_rate 4e-3

english=(--voices slt rms awb)
compose base-data-1 "${english[@]}" --samples 8000 --longest 3 --distinct --kinds words --word_references 1 --held_out 0 --seed 30
train_base base-untrained base-1 "$out/base-data-1/shards" --tokens_per_pack 1024 --max_steps 600 --learning_rate 2e-3 \
    --head_learning_rate 2e-3 --train_on_reference true
compose base-data-2 "${english[@]}" --samples 12000 --longest 7 --held_out 0 --seed 40
train_base base-1 base-2 "$out/base-data-2/shards" --tokens_per_pack 1536 --max_steps 800 --learning_rate 1.5e-3 \
    --head_learning_rate 1.5e-3
compose base-data-3 "${english[@]}" --samples 12000 --longest 14 --takes 2 --kinds words digits numbers digits numbers --seed 50
train_base base-2 base-3 "$out/base-data-3/shards" --tokens_per_pack 2048 --max_steps 600 --learning_rate 1e-3 \
    --head_learning_rate 1e-3 --lr_decay_fraction 0.6

# at last it reads Arabic that is written only, and hears recorded sentences, English ones and a few Arabic ones without
# numbers, so that it has an idea of sounds and letters that it does not know
compose base-data-4 "${english[@]}" --samples 12000 --longest 14 --takes 2 --kinds words digits numbers digits numbers \
    --held_out 0 --seed 70 --written 4
train_base base-3 base-4 "$out/base-data-4/shards" --tokens_per_pack 2048 --max_steps 400 --learning_rate 1e-3 \
    --head_learning_rate 1e-3 --lr_decay_fraction 0.6
speech recorded-en --minutes 10 --voices slt rms awb kal --kinds digits numbers --seed 21
speech recorded-ar --minutes 3 --voices huda zayd omar --kinds general --seed 22
for set in recorded-en recorded-ar; do
    "$python" examples/miniature/base_data.py --speech "$out/$set" --longest_reference 4
    encode $set chatml.jsonl --val_fraction 0.02
done
recorded=("$out/recorded-en/shards" "$out/recorded-ar/shards")
train_base base-4 base-5 "$out/base-data-4/shards" "${recorded[@]}" --mix_weights 6 1.5 0.5 \
    --tokens_per_pack 2048 --max_steps 400 --learning_rate 1e-3 --head_learning_rate 1e-3 --lr_decay_fraction 0.6
train_base base-5 base-6 "$out/base-data-4/shards" "${recorded[@]}" --mix_weights 12 1 0.5 \
    --tokens_per_pack 2048 --max_steps 500 --learning_rate 8e-4 --head_learning_rate 8e-4 --lr_decay_fraction 0.6 --seed 3

# and it meets many references, so that one that it has not heard will do: 600 phrases of each voice, of up to four words
record_words() {
    [ -f "$out/$1/manifest.jsonl" ] || "$python" examples/miniature/word_clips.py --out "$out/$1" "${english[@]}" "${@:2}"
    encode "$1" manifest.jsonl --ref_drop 1 --min_seconds 0.1 --val_fraction 0
    words=$out/$1 # of which `compose` makes sentences from here on
}
record_words words-600 --takes 4 --references 600 --longest_reference 4 --seed 7
compose base-data-6 "${english[@]}" --samples 32000 --longest 10 --kinds digits numbers digits numbers words --held_out 0 \
    --seed 100 --written 5
train_base base-6 base-7 "$out/base-data-6/shards" "${recorded[@]}" --mix_weights 12 1 0.5 \
    --tokens_per_pack 2048 --max_steps 1000 --learning_rate 1e-3 --head_learning_rate 1e-3 --seed 11
compose base-data-7 "${english[@]}" --samples 32000 --longest 10 --kinds digits numbers digits numbers words --held_out 0 \
    --seed 101 --written 5
launch=("$(dirname "$python")/torchrun" --standalone --nproc_per_node 2)
OMP_NUM_THREADS=1 train_base base-7 base-8 "$out/base-data-7/shards" "${recorded[@]}" --mix_weights 12 1 0.5 \
    --tokens_per_pack 2048 --max_steps 370 --learning_rate 1e-3 --head_learning_rate 1e-3 --lr_decay_fraction 0.7 --seed 12

# and longer sentences, in which words repeat: there it has to look at more than the word before to know where it is
for half in 0 1; do
    compose base-data-8-$half "${english[@]}" --samples 30000 --longest 14 --kinds numbers numbers digits words few \
        --held_out 0 --seed 11$half --written 5
done
OMP_NUM_THREADS=1 train_base base-8 base "$out/base-data-8-0/shards" "$out/base-data-8-1/shards" "${recorded[@]}" \
    --mix_weights 6 6 1 0.5 --tokens_per_pack 2048 --max_steps 1400 --learning_rate 1e-3 --head_learning_rate 1e-3 \
    --lr_decay_fraction 0.7 --seed 14

# recordings of the demo, and the figures of the model card; with WHISPER=openai/whisper-base the codec's by that, too
[ -f "$out/demo-words/manifest.jsonl" ] || "$python" examples/miniature/word_clips.py --out "$out/demo-words" \
    --digits_only --references 3 --voices slt rms awb amal karim nour
judge_codec() {
    "$python" examples/miniature/evaluate_codec.py --codec "$codec" --speech "$out/$1" --clips "$2" --asr "$3" --out "$out/$4" "${@:5}"
}
judge_codec codec-narrow 14 "$out/recogniser/model" codec-eval-narrow
judge_codec asr-domain 15 "$out/recogniser/model" codec-eval-domain
judge_codec codec-wide 6 "$out/recogniser/model" codec-eval-wide
[ -z "${WHISPER:-}" ] || judge_codec codec-narrow 14 "$WHISPER" codec-eval-whisper --languages en
[ -z "${WHISPER:-}" ] || judge_codec asr-domain 15 "$WHISPER" codec-eval-whisper-domain --languages en
record_words words-anew --takes 2 --references 20 --seed 78 --unlike "$out/words" "$out/words-600" # never heard
compose base-held-out "${english[@]}" --samples 3 --longest 14 --takes 2 --kinds digits numbers --held_out 20 --seed 80
for layout in chat serve; do
    "$(dirname "$python")/higgs-eval" --model_path "base=$out/base" --audio_tokenizer_path "$codec" --layout $layout \
        --temperature 0.3 --ras_win_len 0 --data "$out/base-held-out/held_out.jsonl" --out "$out/base-eval-$layout" \
        --asr "$out/recogniser/model" --ceiling --speak_seconds 10
done
echo "in place of examples/miniature/{codec,base,recogniser,words}: $out/codec/{native,original}, $out/base, $out/recogniser/model," \
    "$out/demo-words"
