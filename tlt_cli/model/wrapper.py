"""The decoder as a model of transformers: what `modeling_tlt.py` holds behind the decoder itself.

tlt never imports this file, for it needs transformers; `modeling` ships its text with a checkpoint.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache as States
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from tlt_cli.model.decoder import Decoder
from tlt_cli.model.grouped import decoder_class
from tlt_cli.model.step import Cache

# Releases call the cache by two names, as an argument and in what a model returns.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# Releases of transformers rewrite these keys or drop them; the file's stay as they are.
_AS_GIVEN = ("rope_parameters", "rope_scaling", "rope_theta", "use_cache")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "positions",
    "tie_word_embeddings": "tied",
}


class TltConfig(PretrainedConfig):
    """config.json with every key as the dense model's family spells it; what others ask for is in the description."""

    model_type = "tlt"
    rope_scaling = None  # in place of a property that converts what it is given

    def __init__(self, **given: Any) -> None:
        kept = {key: given.pop(key) for key in _AS_GIVEN if key in given}
        super().__init__(**given)
        for key, value in kept.items():
            setattr(self, key, value)
        family = (given.get("lowrank") or given.get("groups") or {}).get("dense_model_type")
        defaults = CONFIG_MAPPING[str(family)]() if family in CONFIG_MAPPING else None
        for key in _TOKENS:  # it ends where the dense model ends
            if key not in given:
                setattr(self, key, getattr(defaults, key, None))

    def __getattr__(self, key: str) -> Any:
        """Only for keys that config.json lacks. Caches look for layer_types before they look at sliding_window."""
        description = self.__dict__.get("tlt_description")
        if description is not None:
            if key == "use_cache":
                return True
            if key == "layer_types":
                return ["full_attention" if window is None else "sliding_attention" for window in description["window"]]
            if key == "sliding_window":
                return next((window for window in description["window"] if window is not None), None)
            if key in _SIZES and description[_SIZES[key]] is not None:
                return description[_SIZES[key]]
        raise AttributeError(f"{type(self).__name__} has no {key}")


class Seen(Cache):
    """The decoder's view of a cache of transformers. Sliding layers may give back fewer keys than tokens were seen."""

    def __init__(self, states: States) -> None:
        super().__init__(0)
        self.states = states
        self.length = int(states.get_seq_length())

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this step's keys and values, [B, kv heads, T, D] each; returns all that are still needed."""
        keys, values = self.states.update(key, value, layer)
        return keys, values


class TltPreTrainedModel(PreTrainedModel):
    """A decoder whose modules are this model's own, so that tensors are named as in the file."""

    config_class = TltConfig
    decoder: Decoder
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        description = {**config.tlt_description, "lowrank": getattr(config, "lowrank", None)}
        if description.get("groups"):
            shared = {key: config.groups[key] for key in ("weights", "glue", "dense") if key in config.groups}
            parts = [
                {**own, "lowrank": said.get("lowrank")}
                for own, said in zip(description["groups"]["parts"], config.groups["parts"], strict=True)
            ]
            description["groups"] = {"parts": parts, **shared}
        description = self._changed(description)
        decoder = decoder_class(description)(description)
        object.__setattr__(self, "decoder", decoder)  # not as a module: its name would stand before all others
        for name, module in decoder.named_children():
            self.add_module(name, module)
        self.post_init()

    def _changed(self, description: dict[str, Any]) -> dict[str, Any]:
        return description

    def _init_weights(self, module: Any) -> None:
        """The decoder has initialized itself."""

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As in transformers, but a tensor that is missing, left over or of the wrong shape is an error."""
        loaded: Any = super().from_pretrained(*arguments, output_loading_info=True, **options)
        model, info = loaded
        for kind, what in (
            ("missing_keys", "is missing from the checkpoint"),
            ("unexpected_keys", "is in the checkpoint, but config.json does not say what for"),
            ("mismatched_keys", "has another shape than config.json says"),
        ):
            for found in sorted(info[kind], key=str):
                raise ValueError(f"{found if isinstance(found, str) else found[0]} {what}")
        for name, stored in model.named_buffers():
            for rows, _ in model.decoder.row_numbers(name, stored) if name.endswith(".lowrank_rows") else ():
                if bool((rows.diff() <= 0).any()):
                    raise ValueError(f"{name} must number rows of a matrix, each once and ascending")
        return (model, info) if output_loading_info else model

    def _run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        states: States | None,
        use_cache: bool | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, States | None, tuple[Tensor, ...] | None]:
        """The normalized stream [B, T, H], the cache, and where asked for every block's input and the result."""
        if input_ids is None or options.get("inputs_embeds") is not None:
            raise ValueError("this model reads input_ids; inputs_embeds are not supported")
        if options.get("output_attentions"):
            raise ValueError("this model does not give out its attention weights")
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", False)) and not self.training
        if use_cache and states is None:
            states = DynamicCache()
        decoder, length = self.decoder, input_ids.shape[1]
        seen = None if states is None else Seen(states)
        total = length if seen is None else seen.length + length
        step = decoder.begin(length, seen, self._present(attention_mask, total))
        x, streams = decoder.embed(input_ids, step), []
        for layer in range(decoder.description["layers"]):
            streams.append(x)
            x = decoder.block(x, layer, step)
        x = decoder.normalize(x, "final_norm")
        return x, states, (*streams, x) if options.get("output_hidden_states") else None

    def _present(self, attention_mask: Tensor | None, total: int) -> Tensor | None:
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] != total:
            raise ValueError(f"attention_mask must be [batch, {total}], not {list(attention_mask.shape)}")
        present = attention_mask.bool()
        return None if bool(present.all()) else present


class TltModel(TltPreTrainedModel):
    """The blocks without a head: ids [B, T] in, the normalized stream [B, T, H] out."""

    def _changed(self, description: dict[str, Any]) -> dict[str, Any]:
        roles, groups = dict(description["roles"]), description.get("groups")
        head = roles.pop("head", None)
        gone = set() if head is None else {head["name"]}
        if groups is not None and groups.get("glue"):
            gone |= {site for site in groups["glue"]["sites"] if "{layer}" not in site}
            glue = {**groups["glue"], "sites": [site for site in groups["glue"]["sites"] if site not in gone]}
            groups = {**groups, "glue": glue}
        if groups is not None and groups.get("dense"):
            groups = {**groups, "dense": [site for site in groups["dense"] if site not in gone]}
        self._keys_to_ignore_on_load_unexpected = ["^" + name.replace(".", r"\.") + r"\." for name in sorted(gone)]
        lowrank = description["lowrank"]
        if lowrank is not None:
            ranks = {slot: rank for slot, rank in lowrank["ranks"].items() if head is None or slot != head["name"]}
            lowrank = {**lowrank, "ranks": ranks}
        return {**description, "roles": roles, "tied": True, "lowrank": lowrank, "groups": groups}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: States | None = None,
        cache: States | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """As in transformers. Positions follow from attention_mask [B, S]: each row counts from its first token."""
        states = past_key_values if cache is None else cache
        x, states, streams = self._run(input_ids, attention_mask, states, use_cache, options)
        cached: dict[str, Any] = {_CACHE: states}
        found = BaseModelOutputWithPast(last_hidden_state=x, hidden_states=streams, **cached)
        return found.to_tuple() if return_dict is False else found


class TltForCausalLM(TltPreTrainedModel, GenerationMixin):
    """The language model: ids [B, T] in, logits [B, T, V] out."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: States | None = None,
        cache: States | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """As in transformers. Positions follow from attention_mask [B, S]: each row counts from its first token."""
        states = past_key_values if cache is None else cache
        x, states, streams = self._run(input_ids, attention_mask, states, use_cache, options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.decoder.head(x[:, kept]), None
        if labels is not None:
            counted = {"num_items_in_batch": options["num_items_in_batch"]} if "num_items_in_batch" in options else {}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **counted)
        cached: dict[str, Any] = {_CACHE: states}
        found = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=streams, **cached)
        return found.to_tuple() if return_dict is False else found
