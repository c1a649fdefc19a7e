"""`modeling_tlt.py`: the file beside an off-family checkpoint that lets transformers run it where tlt is not installed.

It is the sources of the decoder, of models side by side and of the wrapper, one behind the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tlt_cli.families.factors import DESCRIPTION, KEY, MODEL_TYPE, ROPE_SCALING
from tlt_cli.families.groups import KEY as GROUPS

MODELING = "modeling_tlt.py"
ARCHITECTURE = "TltForCausalLM"
AUTO_MAP = {
    "AutoConfig": "modeling_tlt.TltConfig",
    "AutoModel": "modeling_tlt.TltModel",
    "AutoModelForCausalLM": f"modeling_tlt.{ARCHITECTURE}",
}

_HEAD = '''"""A model that tlt made and no class of transformers describes. Load it with trust_remote_code=True.

This file needs torch and transformers alone. It is the same for every such model: what this one computes is data in
config.json, under "tlt_description", "lowrank" and "groups". Licence: Apache-2.0.
"""
'''
_DOCSTRING = re.compile(r'\A""".*?"""\n', re.DOTALL)
_SOURCES = ("step.py", "decoder.py", "grouped_factors.py", "grouped.py", "wrapper.py")
_NOT_SHIPPED = re.compile(
    r"^(from __future__ .*|from tlt_cli\.model\.(step|decoder|grouped_factors|grouped) import .*|# mypy: .*)\n",
    re.MULTILINE,
)


def modeling_source() -> bytes:
    """The whole file."""
    texts = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _SOURCES]
    bodies = [_NOT_SHIPPED.sub("", _DOCSTRING.sub("", text, count=1)).strip() for text in texts]
    source = f"{_HEAD}\nfrom __future__ import annotations\n\n" + "\n\n\n".join(bodies) + "\n"
    assert "tlt_cli" not in source
    return source.encode()


def shipped(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """The config with which transformers finds the file, and without the file refuses the model."""
    plain = {key: value for key, value in description.items() if key != KEY}
    if plain.get(GROUPS) is not None:  # what stands under the config's own key stands there once
        parts = [{key: value for key, value in part.items() if key != KEY} for part in plain[GROUPS]["parts"]]
        plain[GROUPS] = {"parts": parts}
    kept = config[KEY if KEY in config else GROUPS]
    own = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "auto_map": AUTO_MAP, DESCRIPTION: plain}
    return {key: value for key, value in config.items() if key != ROPE_SCALING or key not in kept} | own
