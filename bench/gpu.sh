#!/usr/bin/env bash
# Everything at the released sizes on one GPU: training step side by side, eager and by Triton kernels; the whole
# trainer, by the faster of them; encoding (`audio_hours_an_hour`: a GPU hour); kinds of LoRA; compiled layers beside
# the others; growth, roofline, simulated scale. Random weights and synthetic samples; needs no network. Writes one
# JSON, with hardware and versions; its `kernels` is the choice for --kernels.
#
#     bench/gpu.sh [OUT] [SIZE]        (OUT: gpu.json; SIZE: 3b; tiny is for a machine without a GPU)
#
# PYTHON names the interpreter; torch 2.11 with Python 3.12 will do. All of it ends within 15 minutes, or within LIMIT_S
# seconds: every part has a time limit, the most wanted come first, and a part that fails or runs out of time is named in
# the JSON while the others go on. PARTS names the parts to run ("step loop", say); by default all.
set -uo pipefail
cd "$(dirname "$0")"
out=$(realpath -m "${1:-gpu.json}")
size=${2:-3b}
python=${PYTHON:-python3}
whole_s=${LIMIT_S:-900}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! "$python" -c 'import higgs_tune.train' 2>/dev/null; then # no install: the folders, under the name they import by
    ln -s "$(realpath ..)" "$work/higgs_tune"
    export PYTHONPATH="$work${PYTHONPATH:+:$PYTHONPATH}"
fi

part() { # name, seconds, command...
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [[ " ${PARTS:-$name} " == *" $name "* ]] || return 0
    limit=$((limit < whole_s - SECONDS ? limit : whole_s - SECONDS))
    if [ "$limit" -le 0 ]; then
        echo "no time was left" >"$work/$name.failed"
    elif timeout --kill-after 5 "$limit" "$python" -u "$@" --out "$work/$name.json" >"$work/$name.log" 2>&1; then
        tail -n 14 "$work/$name.log"
    else
        echo "$name failed or took more than $limit s:" && tail -n 5 "$work/$name.log"
        tail -n 5 "$work/$name.log" >"$work/$name.failed"
    fi
    echo "$((SECONDS - began))" >"$work/$name.seconds"
}

if [ "$size" = tiny ]; then
    packs=(1024 2048) lengths=(128 512) length_pack=2048 samples=4 pairs=2 steps=15 pack=2048 loop_packs=(2048)
    kinds_pack=1024 clips=(--samples 2 --seconds 1 --rounds 1)
else
    packs=(2048 4096 8192 16384 32768) lengths=(128 512 2048 4096) length_pack=16384 samples=33 pairs=5 steps=33
    pack=16384 loop_packs=(16384 32768) kinds_pack=4096
    clips=(--samples 160 --rounds 1 --device cuda --num_processes 6)
fi
step=(train_step.py --size "$size" --samples "$samples" --pairs "$pairs" --tokens_per_pack "$pack")
chosen() { # by a run of the step
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["choice"] or "")' "$work/$1.json" 2>/dev/null
}
part step 180 "${step[@]}" --parts --kernels triton
choice=$(chosen step)
part loop 200 train_loop.py --size "$size" --steps "$steps" --tokens_per_pack "${loop_packs[@]}" --kernels "${choice:-auto}"
part encode 120 preprocess.py --shares 1 --loops 1 "${clips[@]}"
part kinds 100 lora_kinds.py --size "$size" --positions "$kinds_pack" --pairs "$pairs" --kernels "${choice:-auto}"
part compiled 240 "${step[@]}" --kernels triton compiled
(
    export CUDA_VISIBLE_DEVICES= # arithmetic and simulation, beside the GPU's work
    part roofline 60 -m models.roofline
    part scale 90 -m models.scale_sim --samples 100000
) &
part growth 100 growth.py --size "$size" --packs "${packs[@]}" --lengths "${lengths[@]}" --length_pack "$length_pack" \
    --kernels "${choice:-auto}"
part growth_eager 80 growth.py --size "$size" --packs "${packs[@]}" --lengths "${lengths[0]}" \
    --length_pack "$length_pack" --kernels eager
wait

choice=$(chosen compiled || echo "$choice")
"$python" - "$work" "$out" "$size" "$choice" <<'PYTHON'
import json, sys
from pathlib import Path
from machine import describe_machine

work, out = Path(sys.argv[1]), Path(sys.argv[2])
result = {"machine": describe_machine(), "size": sys.argv[3], "kernels": sys.argv[4] or None}
for seconds in sorted(work.glob("*.seconds")):
    name = seconds.stem
    done, failed = work / f"{name}.json", work / f"{name}.failed"
    found = json.loads(done.read_text()) if done.exists() else {}
    if failed.exists():
        found["failed"] = failed.read_text()
    result[name] = found | {"took_s": int(seconds.read_text())}
out.write_text(json.dumps(result, indent=1) + "\n")
print(out)
sys.exit(any("failed" in part for part in result.values() if isinstance(part, dict)))
PYTHON
