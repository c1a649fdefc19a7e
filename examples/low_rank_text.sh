#!/usr/bin/env bash
# A low-rank regularizer on text, end to end: the same small model trained with and without one, from the same weights
# on the same batches; then every matrix of its blocks is cut to each rank by plain SVD and judged on text held out.
#
#     low_rank_text.sh [TEXT STEPS [SEED...]]
#
# With nothing given: the text that every Python carries and a moment of training, which shows the way and no more. With
# a megabyte of text, 400 steps and three seeds it takes some five minutes on one core and the table means something:
#
#     low_rank_text.sh tinyshakespeare.txt 400 0 1 2
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # so small a model is faster on one
text=$(realpath "${1:-/dev/null}")
steps=${2:-10}
seeds=("${@:3}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0)
forms=(none decay concentration participation nuclear nuclear3)  # "decay" is weight decay of nuclear's strength: what is it worth beyond that?
[ $# -gt 0 ] || forms=(none nuclear)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# Nine tenths to train on, and from what is left as much as is quick to judge.
python3 - "$text" <<'PYTHON'
import pathlib, pydoc_data.topics, sys
text = pathlib.Path(sys.argv[1]).read_bytes() or "\n".join(pydoc_data.topics.topics.values()).encode()
cut = len(text) * 9 // 10
pathlib.Path("train.txt").write_bytes(text[:cut])
pathlib.Path("held-out.txt").write_bytes(text[cut : cut + 24000])
PYTHON

for seed in "${seeds[@]}"; do
  for form in "${forms[@]}"; do
    case $form in
      none) how=() ;;
      decay) how=(--weight-decay 1.1) ;;  # 0.1 is what all others have
      concentration) how=(--regularizer concentration --strength 1 --regularize-every 4) ;;
      participation) how=(--regularizer participation --strength 0.3 --target-rank 8 --regularize-every 4) ;;
      nuclear) how=(--regularizer nuclear --strength 1 --regularize-every 4) ;;
      nuclear3) how=(--regularizer nuclear --strength 3 --regularize-every 4) ;;
    esac
    tlt train --init llama:dim=64,layers=2,heads=4,kv_heads=2,ffn=192 --data train.txt --held-out 0 --context 128 \
      --steps "$steps" --batch-size 8 --lr 3e-3 --schedule linear --seed "$seed" "${how[@]}" \
      -q -o "$form-$seed" > /dev/null
    tlt factor "$form-$seed" --rank-sweep --ranks 4,8,12,16,24,32 --method svd --eval held-out.txt --context 128 \
      --json -q > "$form-$seed.json"
  done
done

python3 - "${#seeds[@]}" "${seeds[@]}" "${forms[@]}" <<'PYTHON'
import json, sys

count = int(sys.argv[1])
seeds, forms = sys.argv[2 : 2 + count], sys.argv[2 + count :]
found = {}
for form in forms:
    sweeps = [json.load(open(f"{form}-{seed}.json"))["points"] for seed in seeds]
    found[form] = [[point["nll"] for point in sweep] for sweep in sweeps]
ranks = [point["rank"] or "all" for point in sweeps[0]]
print("nats per byte held out, the mean of all seeds; * better than none in every one of them")
print(f"{'rank':14}" + "".join(f"{rank:>8} " for rank in ranks))
for form, runs in found.items():
    cells = []
    for at in range(len(ranks)):
        better = all(run[at] < plain[at] for run, plain in zip(runs, found["none"], strict=True))
        cells.append(f"{sum(run[at] for run in runs) / len(runs):8.3f}" + ("*" if better else " "))
    print(f"{form:14}" + "".join(cells))
PYTHON
