"""kvpress's side of `benchmarks.kv`: contexts compressed by its presses, and their continuations scored.

Runs in an environment of its own (`make install-kvpress`). One pass over a context serves all presses, since a press
changes what is stored, not what the context's own tokens see: `Several` hands each of them the same tensors.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

import kvpress
import torch
import transformers
from transformers import DynamicCache

from benchmarks.worker import cores, serve


class Several(kvpress.BasePress):
    """Lets every press compress a layer's keys and values, each into a cache of its own.

    caches: one per press. masked: per press and layer, the entries (batch, head and place) that a press masks
    because its heads keep different numbers; None where it masks none.
    """

    def __init__(self, presses: list[Any]):
        self.presses = presses
        self.caches = [DynamicCache() for _ in presses]
        self.masked: list[list[Any]] = [[] for _ in presses]

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: dict) -> Any:
        """The keys and values as they are: this pass goes on without any compression."""
        for press, cache, masked in zip(self.presses, self.caches, self.masked, strict=True):
            module.masked_key_indices = None
            new = (keys, values)
            if press is not None:
                new = press.compress(module, hidden_states, keys, values, attentions, kwargs)
            cache.update(*new, module.layer_idx)
            masked.append(module.masked_key_indices)
        module.masked_key_indices = None
        return keys, values


class Composed(kvpress.KVComposePress):
    """KVCompose, which reads the context twice by itself; `kept` are the masks of entries by layer and head."""

    def compress_cache(self, model: Any) -> None:
        """Notes the masks, too."""
        self.kept = self.important_mask_per_kv_head
        super().compress_cache(model)


class Presses:
    """Every public method is one call over the pipe: plain values in, plain values out."""

    def about(self) -> dict[str, str]:
        """Versions."""
        return {name: metadata.version(name) for name in ("kvpress", "torch", "transformers")}

    def open(self, checkpoint: str) -> None:
        """Loads a model to compute in float32."""
        torch.set_num_threads(cores())
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True
        ).eval()

    @torch.inference_mode()
    def score(self, context: list[int], target: list[int], asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Mean nats of the target after the context was compressed, and the entries kept, mean over layers and heads.

        asks: `policy`, one of ours by name or "none"; `keep`: entries; `compression`: the share of others; and the
        policy's own settings.
        """
        found: list[Any] = [None] * len(asks)
        for i, ask in enumerate(asks):
            if ask["policy"] == "kvcompose":
                last, cache, _ = self._composed(context, ask)
                found[i] = self._after(last, cache, [None] * len(cache.layers), len(context), target)
        # Observed attention needs the weights, which only the eager attention has; AdaKV refuses eager attention.
        for attention in ("sdpa", "eager"):
            chosen = [
                i
                for i, a in enumerate(asks)
                if found[i] is None and (a["policy"] == "observed_attention") == (attention == "eager")
            ]
            if not chosen:
                continue
            several = Several([press(asks[i], len(context)) for i in chosen])
            self.model.set_attn_implementation(attention)
            with several(self.model):
                states = self.model.model(input_ids=torch.tensor([context]), past_key_values=DynamicCache())
            self.model.set_attn_implementation("sdpa")
            last = states.last_hidden_state[:, -1:]
            for i, cache, masked in zip(chosen, several.caches, several.masked, strict=True):
                found[i] = self._after(last, cache, masked, len(context), target)
        return found

    @torch.inference_mode()
    def kept(self, context: list[int], ask: dict[str, Any]) -> list[list[list[int]]]:
        """The places that KVCompose keeps of a context, by layer and head."""
        masks = self._composed(context, ask)[2]
        return [[mask.nonzero()[:, 0].tolist() for mask in layer] for layer in masks]

    def _composed(self, context: list[int], ask: dict[str, Any]) -> tuple[Any, Any, Any]:
        """The context's last states, the compressed cache, and the masks of what is kept."""
        # The share of all layers together, which is rounded down.
        ratio, cache = 1 - (ask["keep"] + 0.01) / len(context), DynamicCache()
        press = Composed(structured=ask["structured"], compression_ratio=max(ratio, 0.0))
        with press(self.model):
            states = self.model.model(input_ids=torch.tensor([context]), past_key_values=cache)
        return states.last_hidden_state[:, -1:], cache, press.kept

    def _after(self, last: Any, cache: Any, masked: list[Any], start: int, target: list[int]) -> dict[str, Any]:
        """Scores a target that begins at position `start`, its first token by the states `last` [1, 1, d]."""
        held = _held(cache, masked, self.model.config.num_key_value_heads)
        states = [last]
        if len(target) > 1:
            hooks = [
                layer.self_attn.register_forward_pre_hook(_mask_hook(cache, hidden), with_kwargs=True)
                for layer, hidden in zip(self.model.model.layers, masked, strict=True)
            ]
            try:
                ids = torch.tensor([target[:-1]])
                at = torch.arange(start, start + len(target) - 1)[None]
                out = self.model.model(input_ids=ids, past_key_values=cache, position_ids=at)
            finally:
                for hook in hooks:
                    hook.remove()
            states.append(out.last_hidden_state)
        logits = self.model.lm_head(torch.cat(states, 1))[0].float()
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
        return {"nats": float(nats), "held": held}


def press(ask: dict[str, Any], length: int) -> Any:
    """The press for a policy of ours that keeps `keep` of `length` entries; None for "none".

    Raises ValueError for a policy that kvpress does not have.
    """
    name = ask["policy"]
    if name == "none" or ask["keep"] >= length:
        return None
    n, ratio = ask["keep"], ask["compression"]
    match name:
        case "streaming_llm":
            return kvpress.StreamingLLMPress(ratio, n_sink=ask["sinks"])
        case "tova":
            return kvpress.TOVAPress(ratio)
        case "observed_attention":
            return kvpress.ObservedAttentionPress(ratio)
        case "snapkv":
            return kvpress.SnapKVPress(ratio, ask["window"], ask["pool"])
        case "pyramidkv":
            # Here beta divides the budget, with us what the budget leaves beside the window. The same last layer:
            beta = n / (ask["window"] + (n - ask["window"]) / ask["beta"])
            return kvpress.PyramidKVPress(ratio, ask["window"], ask["pool"], beta)
        case "adakv":
            return kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, ask["window"], ask["pool"]), ask["floor"])
        case "knorm":
            return kvpress.KnormPress(ratio)
        case "keydiff":
            return kvpress.KeyDiffPress(ratio)
        case "expected_attention":
            return kvpress.ExpectedAttentionPress(ratio, ask["future"], ask["sinks"], epsilon=ask["eps"])
    raise ValueError(f"kvpress has no press for {name}")


def _mask_hook(cache: Any, hidden: Any) -> Any:
    """Gives a layer a mask of its own: transformers makes one for all layers, as long as the first layer's cache.

    hidden: entries (batch, head, place) that nothing may see, or None. kvpress itself replaces their keys by one that
    all queries of a call turn away from, found by a search that may fail.
    """

    def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        t, n = kwargs["hidden_states"].shape[1], cache.get_seq_length(module.layer_idx)
        heads = module.config.num_attention_heads
        mask = torch.zeros(1, heads, t, n + t)
        mask[..., n:] = torch.triu(torch.full((t, t), float("-inf")), 1)
        if hidden is not None:
            for g in range(module.num_key_value_groups):
                mask[hidden[0], hidden[1] * module.num_key_value_groups + g, :, hidden[2]] = float("-inf")
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _held(cache: Any, masked: list[Any], heads: int) -> float:
    """Entries per head, mean over layers and heads."""
    counts = [cache.get_seq_length(i) - (0 if m is None else len(m[0]) / heads) for i, m in enumerate(masked)]
    return sum(counts) / len(counts)


if __name__ == "__main__":
    serve(Presses(), (ValueError, OSError))
