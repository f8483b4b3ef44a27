"""Hugging Face models as trunk and head, so that only the rows that count meet the vocabulary."""

from __future__ import annotations

import copy
import difflib
import logging
import typing
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill.head import Head

AUTO = {"mlm": AutoModelForMaskedLM, "clm": AutoModelForCausalLM}
ARCHITECTURES = {"mlm": ("bert", "modernbert"), "clm": ("gpt2", "gpt_neox", "llama")}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Between logits and head(trunk(x)), in standard deviations of the logits. In fp32 rounding makes less than 1e-5;
# scales and caps that models use make 0.01 and more.
SPLIT_TOLERANCE = 1e-3

# What stands between the trunk and the final linear layer, by model type; nothing in models not named here.
TRANSFORMS: dict[str, Callable[[Any], nn.Module]] = {
    "bert": lambda model: model.cls.predictions.transform,
    "modernbert": lambda model: model.head,
}

# What of a model's inside can be asked for -> the keyword that `transformers` knows it by.
OUTPUTS = {"layers": "output_hidden_states", "attentions": "output_attentions"}
PLAIN = frozenset({"attentions", "gradients"})  # of these, what asks for `use_plain_attention`

# No dropout: pre-training at less than one epoch doesn't overfit, and the teacher's and the student's masks
# then agree on what is hidden.
NO_DROPOUT = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "hidden_dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
)


class Inside(NamedTuple):
    """What a model made on its way to the rows that count; empty where nobody asked.

    layers: hidden_ND after the embeddings and after each layer. attentions: each layer's weights_NHL, row n's query
    over the L keys of its sequence, for each of H heads. mixed_ND: what the head reads of a second run, on the inputs
    of `mixed_embeddings`. words_BLD: the word embeddings that the trunk read, within the graph. Beside a teacher alone:
    pulls_BLD, the gradient there of its loss; reference_N, float32, the labels' log-probabilities by the student as it was;
    matches_M, int64, which of the student's rows its M rows stand beside, if it has another tokenizer and so rows of its own.
    """

    layers: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()
    mixed_ND: Tensor | None = None
    words_BLD: Tensor | None = None
    pulls_BLD: Tensor | None = None
    reference_N: Tensor | None = None
    matches_M: Tensor | None = None


class Rows(NamedTuple):
    """The rows that count, hidden_ND (N rows, width D), and the head that makes logits_NV of them."""

    hidden_ND: Tensor
    head: Head
    inside: Inside = Inside()


class Work(NamedTuple):
    """What a model multiplies by, counted while its weights are whole."""

    trunk: int  # numbers in weight matrices that every token meets
    head: int  # that every counted row meets
    attention: int  # layers * width: multiply-adds of a pair of positions, halved


class Inputs(NamedTuple):
    """What a model reads.

    Token ids [B, L] int64, attention_mask None or [B, 1, L, L] bool, position_ids None or [B, L] int64.
    """

    input_ids_BL: Tensor
    attention_mask: Tensor | None
    position_ids_BL: Tensor | None


def _attention_in_fp32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """On CPU torch's attention is 4 to 8 times slower in bf16 than in fp32 at small heads; casts cost little."""
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **settings)
    return output.to(query.dtype), None


ATTENTION = "sdpa"
if not torch.cuda.is_available():
    ATTENTION = "sdpa_in_fp32"
    AttentionInterface.register(ATTENTION, _attention_in_fp32)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def build_model(
    task: str,
    architecture: str,
    overrides: dict[str, Any],
    *,
    vocab_size: int,
    sequence_length: int,
    special_ids: dict[str, int],
    seed: int,
) -> PreTrainedModel:
    """A randomly initialised fp32 model of a `transformers` architecture, its weights a function of `seed` alone.

    Raises:
        ValueError: unknown architecture or config key (with the nearest), too few positions for
            `sequence_length`.
    """
    known = ARCHITECTURES[task]
    if architecture not in known:
        raise ValueError(
            f"model.architecture={architecture!r} does not serve task {task}; supported: {', '.join(known)}"
        )
    defaults = AutoConfig.for_model(architecture)
    for key in overrides:
        if key not in defaults.to_dict() and key not in defaults.attribute_map:
            close = difflib.get_close_matches(key, list(defaults.to_dict()), n=1)
            raise ValueError(
                f"model.overrides.{key} is no key of {type(defaults).__name__}"
                + (f"; did you mean {close[0]}?" if close else "")
            )
    specials = {key: value for key, value in special_ids.items() if hasattr(defaults, key)}
    no_dropout = {key: 0.0 for key in NO_DROPOUT if hasattr(defaults, key)}
    # A copy: transformers fills in defaults inside the mappings it is given.
    config = AutoConfig.for_model(
        architecture,
        **{**no_dropout, "vocab_size": vocab_size, **specials, **copy.deepcopy(overrides)},
        attn_implementation=ATTENTION,
    )
    check_positions(
        config,
        sequence_length,
        f"model.overrides.{defaults.attribute_map.get('max_position_embeddings', 'max_position_embeddings')}",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AUTO[task].from_config(config, dtype=torch.float32, trust_remote_code=False)
    return typing.cast(PreTrainedModel, model)


def check_positions(config: PretrainedConfig, sequence_length: int, key: str) -> None:
    """Raises ValueError, naming `key`, if the config has fewer positions than a sequence has tokens."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        raise ValueError(f"{key} is {positions}, but the shards hold sequences of {sequence_length} tokens")


def final_layer(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that meets the vocabulary."""
    return typing.cast(nn.Linear, model.get_output_embeddings())


def head_of(model: PreTrainedModel) -> Head:
    """The final layer's weights themselves, no copy, and the softcap that `transformers` puts on its logits."""
    layer = final_layer(model)
    return Head(layer.weight, layer.bias, getattr(model.config, "final_logit_softcapping", None))


def counted_hidden(
    model: PreTrainedModel, inputs: Inputs, rows_N: Tensor, needs: Collection[str] = ()
) -> tuple[Tensor, Inside]:
    """Trunk over the whole batch, then what the final layer reads, [N, D], of the rows that count only.

    rows_N: int64 indices into the flattened [B*L] positions. needs: what of the inside comes along: `layers`,
    `attentions`, `gradients` (words_BLD, to differentiate by; both of a model that `use_plain_attention` was called on),
    `mixed` (a second run of the trunk).
    """
    mask = inputs.attention_mask
    if PLAIN.intersection(needs) and mask is not None:  # plain attention adds its mask
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    trunk = partial(
        model.base_model,
        attention_mask=_masks_by_layer_type(model.config, mask),
        position_ids=inputs.position_ids_BL,
    )
    asked = {OUTPUTS[need]: True for need in needs if need in OUTPUTS}
    words_BLD = None
    if "gradients" in needs:
        words_BLD = model.get_input_embeddings()(inputs.input_ids_BL).requires_grad_()  # a frozen model's too
        output = trunk(inputs_embeds=words_BLD, **asked)
    else:
        output = trunk(input_ids=inputs.input_ids_BL, **asked)
    hidden_ND = output.last_hidden_state.flatten(0, 1)[rows_N]
    layers = tuple(h.flatten(0, 1)[rows_N] for h in output.hidden_states) if "layers" in needs else ()
    attentions = (
        tuple(a.transpose(1, 2).flatten(0, 1)[rows_N] for a in output.attentions)
        if "attentions" in needs
        else ()
    )
    mixed_ND = None
    if "mixed" in needs:
        again = trunk(inputs_embeds=mixed_embeddings(model, inputs.input_ids_BL))
        mixed_ND = _transformed(model, again.last_hidden_state.flatten(0, 1)[rows_N])
    return _transformed(model, hidden_ND), Inside(layers, attentions, mixed_ND, words_BLD)


def _transformed(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    transform = TRANSFORMS.get(model.config.model_type)
    return transform(model)(hidden_ND) if transform else hidden_ND


def mixed_embeddings(model: PreTrainedModel, input_ids_BL: Tensor) -> Tensor:
    """[B, L, D]: each sequence's word embeddings mixed with those of the sequence before it in the micro-batch.

    lambda e_b + (1 - lambda) e_{b-1}, one lambda from U(1/2, 1), that of Beta(1, 1) with the larger share on the
    sequence that has the labels. It is a function of the ids: student and teacher mix alike.
    """
    embeddings_BLD = model.get_input_embeddings()(input_ids_BL)
    share = (0.5 + (input_ids_BL.sum() % 1009).float() / 2018).to(embeddings_BLD.dtype)  # no wait for a GPU
    return share * embeddings_BLD + (1 - share) * embeddings_BLD.roll(1, 0)


def counted_rows(model: PreTrainedModel, inputs: Inputs, rows_N: Tensor, needs: Collection[str] = ()) -> Rows:
    """`counted_hidden` with the head that reads it."""
    hidden_ND, inside = counted_hidden(model, inputs, rows_N, needs)
    return Rows(hidden_ND, head_of(model), inside)


def use_plain_attention(model: PreTrainedModel) -> None:
    """Have the model compute attention in the plain way; slower, but it keeps its weights and can be derived twice.

    Raises:
        ValueError: layers that slide a window, whose masks plain attention takes in another form.
    """
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise ValueError(
            f"{model.config.model_type} has layers with a sliding window, which plain attention can't have; "
            "leave out the objective that needs attentions or gradients"
        )
    model.set_attn_implementation("eager")


def _masks_by_layer_type(config: PretrainedConfig, mask: Tensor | None) -> Tensor | dict[str, Tensor] | None:
    """Layers with a sliding window take a ready mask as it is, so theirs must have the window cut in."""
    if mask is None or "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return mask
    index = torch.arange(mask.shape[-1], device=mask.device)
    near = (index[:, None] - index[None, :]).abs() <= config.sliding_window
    return {"full_attention": mask, "sliding_attention": mask & near}


def check_split(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not head(trunk(x)), e.g. one that scales or caps them afterwards.

    Raises:
        ValueError: no final linear layer, or the two differ on a probe input by more than 0.001 standard deviations
            of the logits.
    """
    if not isinstance(final_layer(model), nn.Linear):
        raise ValueError(
            f"{model.config.model_type} has no linear layer that makes its logits; it is not supported"
        )
    ids_BL = torch.arange(8, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    was_training = model.training
    model.eval()  # with dropout two forwards differ
    with torch.no_grad():
        rows = counted_rows(model, Inputs(ids_BL, None, None), torch.arange(8, device=model.device))
        whole, split = model(input_ids=ids_BL).logits[0], rows.head(rows.hidden_ND)
    model.train(was_training)
    whole, split = whole.float(), split.float()
    rounding = 4 * torch.finfo(model.dtype).eps * whole.abs().max()  # other shapes of product, rounded apart
    if (
        not (whole - split).abs().max() <= SPLIT_TOLERANCE * whole.std() + rounding
    ):  # not <=: a NaN is refused too
        raise ValueError(
            f"{model.config.model_type}: the logits are not head(trunk(x)); this architecture is not supported"
        )


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def work_of(model: PreTrainedModel) -> Work:
    """Counts the weight matrices. Embedding look-ups are free."""
    transform = TRANSFORMS.get(model.config.model_type)
    layers = [final_layer(model), *([transform(model)] if transform else [])]
    head = [p for layer in layers for p in layer.parameters() if p.dim() == 2]
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    apart = {id(p) for p in (*head, *embeddings)}
    trunk = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in apart)
    attention = model.config.num_hidden_layers * model.config.hidden_size
    return Work(trunk, sum(p.numel() for p in head), attention)


def flops_per_step(work: Work, num_tokens: int, num_rows: float, length: int, backward: bool) -> float:
    """Floating-point operations over `num_tokens` tokens of which `num_rows` rows meet the head.

    Two per multiply-add of every weight matrix that a token meets, plus attention's 4*length*width per token
    and layer (Kaplan et al. 2020, table 1, without halving for causality). A backward is twice the forward and
    comes on top of it.
    """
    forward = 2.0 * (num_tokens * (work.trunk + 2 * length * work.attention) + num_rows * work.head)
    return forward * (3 if backward else 1)


def quiet_transformers() -> None:
    """Keep `transformers` from printing progress bars and advice into a training log."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
