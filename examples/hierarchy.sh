#!/usr/bin/env bash
# Hierarchies in the embedding, end to end: the same small model of bytes trained plainly, with categories imposed on
# the first 8 entries of its embedding (vowels, consonants, digits, punctuation, whitespace), and with categories that it
# finds itself. How far clusters of those 8 entries agree with the categories is printed for all of them; the maps of
# what is alike in each prefix lie in the folder OUT, where one is given and matplotlib is there.
#
#     hierarchy.sh [TEXT STEPS OUT [SEED...]]
#
# With nothing given: the text that every Python carries and a moment of training, which shows the way and no more. With
# a megabyte of text, 400 steps and three seeds it takes some six minutes on one core and the table means something:
#
#     hierarchy.sh tinyshakespeare.txt 400 maps 0 1 2
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # so small a model is faster on one
text=$(realpath "${1:-/dev/null}")
steps=${2:-10}
maps=${3:+$(realpath "$3")}
seeds=("${@:4}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0)
forms=(plain imposed emergent nested)
[ $# -gt 0 ] || forms=(plain imposed)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# The characters that the text has, by kind: tokens that training never meets stay where they were drawn.
python3 - "$text" <<'PYTHON'
import json, pathlib, pydoc_data.topics, string, sys
text = pathlib.Path(sys.argv[1]).read_bytes() or "\n".join(pydoc_data.topics.topics.values()).encode()[:100_000]
pathlib.Path("text.txt").write_bytes(text)
vowels = "aeiouAEIOU"
kinds = {
    "vowels": vowels, "consonants": set(string.ascii_letters) - set(vowels), "digits": string.digits,
    "punctuation": string.punctuation, "whitespace": string.whitespace,
}
known = set(text)
found = {name: sorted(ord(letter) for letter in kind if ord(letter) in known) for name, kind in kinds.items()}
pathlib.Path("kinds.json").write_text(json.dumps({name: tokens for name, tokens in found.items() if tokens}))
PYTHON

for seed in "${seeds[@]}"; do
  for form in "${forms[@]}"; do
    case $form in
      plain) how=() ;;
      imposed) how=(--hierarchy imposed:kinds.json --prefixes 8,16,32) ;;
      emergent) how=(--hierarchy emergent --prefixes 8,16,32) ;;
      nested) how=(--nested-only embeddings --prefixes 8,16,32) ;;
    esac
    tlt train --init llama:dim=64,layers=2,heads=4,kv_heads=2,ffn=192,tie_word_embeddings=true --data text.txt \
      --context 128 --batch-size 8 --steps "$steps" --lr 3e-3 --schedule linear --seed "$seed" "${how[@]}" \
      --eval-every "$steps" --save-every 0 \
      --json -q -o "$form-$seed" > "$form-$seed.train.json"
    tlt inspect "$form-$seed" --categories kinds.json --prefixes 8,16,32,64 --json -q > "$form-$seed.json"
  done
done

if [ -n "$maps" ] && python3 -c 'import matplotlib' 2> /dev/null; then
  mkdir -p "$maps"
  for form in "${forms[@]}"; do
    tlt inspect "$form-${seeds[0]}" --heatmap "$maps/$form.png" --categories kinds.json --prefixes 8,16,32,64 \
      --force -q > /dev/null
  done
fi

# What the model found itself, at the shortest prefix.
if [ -d "emergent-${seeds[0]}" ]; then
  tlt inspect "emergent-${seeds[0]}" --tokens 128 --prefixes 8 --json -q | python3 -c '
import itertools, json, pathlib, sys
(found,) = json.load(sys.stdin)["maps"]
known = set(pathlib.Path("text.txt").read_bytes())
each = [(label, name) for label, name, token in zip(found["labels"], found["tokens"], found["order"]) if token in known]
for _, group in itertools.groupby(each, key=lambda pair: pair[0]):
    print("found:", " ".join(name for _, name in group))
'
fi

python3 - "${#seeds[@]}" "${seeds[@]}" "${forms[@]}" <<'PYTHON'
import json, sys
from statistics import fmean, stdev

count = int(sys.argv[1])
seeds, forms = sys.argv[2 : 2 + count], sys.argv[2 + count :]
print("mean and deviation over the seeds; agreement of clusters with the kinds of character: adjusted Rand index")
print(f"{'':10}{'loss held out':>16}" + "".join(f"{f'first {size}':>16}" for size in (8, 16, 32, 64)) + f"{'silhouette of the kinds, 8':>28}")
for form in forms:
    runs = [json.load(open(f"{form}-{seed}.train.json"))["evaluation"]["loss"] for seed in seeds]
    seen = [json.load(open(f"{form}-{seed}.json"))["maps"] for seed in seeds]
    columns = [runs, *([maps[at]["ari"] for maps in seen] for at in range(4)), [maps[0]["category_silhouette"] for maps in seen]]
    cells = [f"{fmean(values):.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}" for values in columns]
    print(f"{form:10}" + "".join(f"{cell:>16}" for cell in cells[:-1]) + f"{cells[-1]:>28}")
PYTHON
