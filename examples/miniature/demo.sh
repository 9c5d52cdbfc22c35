#!/bin/bash
# The miniature learns to say Arabic digits: examples/miniature/demo.sh [FOLDER], by default runs/demo. A few minutes on two
# cores; no synthesiser, no network. `make demo` does the set-up before. Ends with a table (base, tuned, ceiling) and wavs.
set -euo pipefail
cd "$(dirname "$0")/../.." # names are from the root of the repository
out=${1:-runs/demo} here=examples/miniature
bin=${BIN:-.venv/bin} base=${BASE:-$here/base} codec=$here/codec/native
checkpoint=(--model_path "$base" --audio_tokenizer_path "$codec")
train() {
    "$bin/torchrun" --standalone --nproc_per_node "${PROCESSES:-2}" -m higgs_tune.train --train_data_dir "$out/shards" \
        --tokens_per_pack 1024 --lora_r 32 --lora_alpha 32 --learning_rate 3e-3 --lr_scheduler_type cosine --warmup_steps 10 "$@"
}
speak() {
    "$bin/higgs-speak" --audio_tokenizer_path "$codec" --layout chat --temperature 0.3 --ras_win_len 0 --max_seconds 8 "$@"
}
if [ -n "$(ls -A "$out" 2>/dev/null)" ] && [ ! -f "$out/.demo" ]; then
    echo "error: $out is not of an earlier demo; name another folder" >&2
    exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.demo"

echo "== 1. recordings of words and phrases, six voices, two languages -> codes"
"$bin/higgs-preprocess" --data $here/words/manifest.jsonl --out "$out/words" "${checkpoint[@]}" --ref_drop 1 --min_seconds 0.1 --val_fraction 0

echo "== 2. sentences of these words -> shards: amal and karim in Arabic, and English, so that it is not forgotten"
"$bin/python" examples/miniature/compose.py "${checkpoint[@]}" --words $here/words --word_shards "$out/words" --out "$out/data" \
    --voices amal karim amal karim slt rms awb --held_out_voices amal karim nour slt rms awb --kinds digits \
    --layouts chat --longest 5 --samples "${SAMPLES:-4000}" --held_out 8
mv "$out/data/shards" "$out/shards"

echo "== 3. stage 1: text"
train --training_stage stage1 --model_path "$base" --output_dir "$out/stage1" --max_steps "${STEPS1:-60}" --eval_steps 30

echo "== 4. stage 2: text and audio, from stage 1"
train --training_stage stage2 --model_path "$out/stage1" --output_dir "$out/stage2" --max_steps "${STEPS2:-330}" \
    --train_audio_head --train_audio_embeddings --head_learning_rate 2e-3 --codebook_loss_weights 8 2 1 1 1 1 1 1 \
    --eval_steps 50 --sample_steps 100 --num_samples 2 --sample_max_seconds 8

echo "== 5. one held-out Arabic sentence, in a voice that neither has been trained on: the base, and the tuned model"
mkdir -p "$out/spoken"
text="خمسة ثلاثة سبعة أربعة" clip=$here/words/phrases/nour-00.flac
said=$("$bin/python" -c 'import json, sys; print(next(r["text"] for r in map(json.loads, open(sys.argv[1])) if r["audio"] == sys.argv[2]))' \
    $here/words/manifest.jsonl phrases/nour-00.flac)
for model in "base=$base" "tuned=$out/stage2"; do
    speak --model_path "${model#*=}" --ref_audio "$clip" --ref_text "$said" --text "$text" -o "$out/spoken/${model%%=*}.wav"
done

echo "== 6. held-out sentences of all voices: base against tuned against what the codec can do"
"$bin/higgs-eval" --model_path "base=$base" "tuned=$out/stage2" --audio_tokenizer_path "$codec" --layout chat \
    --temperature 0.3 --ras_win_len 0 --data "$out/data/held_out.jsonl" --out "$out/eval" --asr $here/recogniser \
    --ceiling --speak_seconds 8
"$bin/python" examples/miniature/demo_table.py "$out/eval" $here/recogniser
"$bin/higgs-inspect" report "$out/shards" -o "$out/report.html" --run "$out/stage1" --run "$out/stage2" --no_audio
echo "listen: $out/spoken/base.wav, $out/spoken/tuned.wav, and all sentences in $out/eval/index.html"
echo "the training: $out/report.html"
