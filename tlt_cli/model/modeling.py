"""`modeling_tlt.py`: the file beside an off-family checkpoint that lets transformers run it where tlt is not installed.

It is the decoder's source and the wrapper's, one behind the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tlt_cli.families.factors import DESCRIPTION, KEY, MODEL_TYPE, ROPE_SCALING

MODELING = "modeling_tlt.py"
ARCHITECTURE = "TltForCausalLM"
AUTO_MAP = {
    "AutoConfig": "modeling_tlt.TltConfig",
    "AutoModel": "modeling_tlt.TltModel",
    "AutoModelForCausalLM": f"modeling_tlt.{ARCHITECTURE}",
}

_HEAD = '''"""A model that tlt made and no class of transformers describes. Load it with trust_remote_code=True.

This file needs torch and transformers alone. It is the same for every such model: what this one computes is data in
config.json, under "tlt_description" and "lowrank". Licence: Apache-2.0.
"""
'''
_DOCSTRING = re.compile(r'\A""".*?"""\n', re.DOTALL)
_NOT_SHIPPED = (
    "from __future__ import annotations\n",
    "from tlt_cli.model.decoder import Cache, Decoder\n",
    '# mypy: disable-error-code="no-untyped-call"\n',
)


def modeling_source() -> bytes:
    """The whole file."""
    folder = Path(__file__).parent
    decoder, wrapper = (
        _DOCSTRING.sub("", (folder / name).read_text(encoding="utf-8"), count=1)
        for name in ("decoder.py", "wrapper.py")
    )
    for line in _NOT_SHIPPED:
        assert line in wrapper
        wrapper = wrapper.replace(line, "")
    source = f"{_HEAD}{decoder}\n\n{wrapper.lstrip()}"
    assert "tlt_cli" not in source
    return source.encode()


def shipped(config: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """The config with which transformers finds the file, and without the file refuses the model."""
    plain = {key: value for key, value in description.items() if key != KEY}
    own = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE, "auto_map": AUTO_MAP, DESCRIPTION: plain}
    return {key: value for key, value in config.items() if key != ROPE_SCALING or key not in config[KEY]} | own
