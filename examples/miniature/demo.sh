#!/bin/bash
# The miniature learns Arabic digits: examples/miniature/demo.sh [FOLDER], by default runs/miniature-demo. Minutes on two
# cores; needs no synthesiser. Ends with a table, base against tuned against ceiling, and the folder of wavs.
set -euo pipefail
cd "$(dirname "$0")/../.." # names are from the root of the repository
out=${1:-runs/miniature-demo} here=examples/miniature
bin=${BIN:-.venv/bin} base=${BASE:-$here/base} words=${WORDS:-$here/words} codec=$here/codec/native
train() {
    "$bin/torchrun" --standalone --nproc_per_node "${PROCESSES:-2}" -m higgs_tune.train --train_data_dir "$out/data/shards" \
        --lr_scheduler_type cosine --warmup_steps 10 --eval_steps 100 --sample_steps 0 "$@"
}
rm -rf "$out"
# two Arabic voices, and English so that it is not forgotten; nour is never trained on
"$bin/python" $here/compose.py --model_path "$base" --audio_tokenizer_path $codec --words "$words" --out "$out/data" \
    --voices amal karim amal karim slt rms awb --held_out_voices amal karim nour slt rms awb --kinds digits \
    --longest 5 --samples "${SAMPLES:-6000}" --held_out 8
train --training_stage stage1 --model_path "$base" --output_dir "$out/stage1" --max_steps "${STEPS1:-100}" \
    --learning_rate 2e-3 --tokens_per_pack 1024 --lora_r 32 --lora_alpha 32
train --training_stage stage2 --model_path "$out/stage1" --output_dir "$out/stage2" --max_steps "${STEPS2:-500}" \
    --learning_rate 4e-3 --tokens_per_pack 1024 --lora_r 32 --lora_alpha 32
"$bin/higgs-eval" --model_path "base=$base" "tuned=$out/stage2" --audio_tokenizer_path $codec --layout chat \
    --data "$out/data/held_out.jsonl" --out "$out/eval" --asr "${ASR:-$here/recogniser}" --ceiling --speak_seconds 8
"$bin/higgs-inspect" report "$out/data/shards" -o "$out/report.html" --run "$out/stage2" --no_audio
echo "listen: $out/eval/wavs and $out/eval/index.html; the run: $out/report.html"
