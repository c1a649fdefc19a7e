#!/usr/bin/env bash
# Growing a model, end to end: make one on the spot, grow it along several axes, look at it, measure it, let it write.
# Takes about half a minute; everything happens in a temporary folder.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# A small model, trained for a moment on some of the text that every Python carries.
small=small
text=text.txt
python3 -c 'import pydoc_data.topics as text; print("\n".join(text.topics.values())[:4000])' > $text
tlt train --init llama:dim=64,layers=2,heads=4,kv_heads=2,ffn=192 --data $text --context 128 --steps 10 -o $small

# Wider: feed-forward and heads follow in proportion. One line on stdout, the path; the table goes to stderr.
tlt grow $small --to-dim 128 -o wide

# Any size on any axis, alone or together, whole multiples or not.
tlt grow $small --to-dim 84 --to-ffn 250 --to-heads 6 --to-kv-heads 3 --to-head-dim 24 --to-layers 3 --to-vocab 300 -o every

# Deeper, and another method for the widths: --verify runs both models on this text besides random tokens.
tlt grow $small --to-dim 96 --to-layers 4 --method spectral --data $text -o deep

# What would it be? Nothing is written, and --json says everything.
tlt grow $small --to-dim 256 --dry-run --json | python3 -c '
import json, sys
plan = json.load(sys.stdin)
print(plan["to"], plan["parameters"], "parameters", plan["bytes"], "bytes")
'

# Nothing was lost: the same perplexity for all of them.
tlt eval $small wide deep --data $text --context 64

# What is in it, and which command made it.
tlt inspect every

# It goes on as the small one would.
tlt generate wide --prompt "The " --max-tokens 20 --temperature 0

# A bare file, with nothing beside it: config.json travels in its header, and any later command finds it there.
tlt grow $small --to-dim 72 -o one.safetensors
tlt grow one.safetensors --to-layers 3 -o two.safetensors
tlt eval $small two.safetensors --data $text --context 64 --json | python3 -c '
import json, sys
small, two = json.load(sys.stdin)["models"]
assert abs(small["nll"] - two["nll"]) < 1e-4, (small["nll"], two["nll"])
print("perplexity", small["perplexity"], "and", two["perplexity"])
'
