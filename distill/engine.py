"""The student under DeepSpeed ZeRO: one engine on CPU and GPU, alone and on many nodes.

The only importer of deepspeed.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.config import Config
from distill.distributed import World
from distill.kernels import Divergence
from distill.models import Inputs, Inside, Rows, counted_hidden, final_layer, head_of, work_of

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

# DeepSpeed would compile this C++ op at every first start (half a minute); only its inference code calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

TAG = "engine"


class Student(nn.Module):
    """The student as the engine sees it: a micro-batch and the teacher's rows in, the objective's sums out.

    learned: what an objective learns beside the model, as projections of hidden states. It is optimized and saved
    with the model, and never exported.
    """

    def __init__(self, model: PreTrainedModel, learned: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.model, self.last = model, FusedHead()
        self.learned = nn.ModuleDict(learned)

    def forward(
        self, inputs: Inputs, rows_N: Tensor, labels_N: Tensor, teacher: Rows | None, objective: Any
    ) -> Divergence:
        hidden_ND, inside = counted_hidden(self.model, inputs, rows_N, objective.needs)
        around = (rows_N // inputs.input_ids_BL.shape[1], self.learned)
        return self.last(self.model, hidden_ND, inside, labels_N, teacher, objective, around)


class FusedHead(nn.Module):
    """Final layer and objective in one step. A module, as ZeRO 3 gathers weights around a module's two passes.

    It owns no weights: they keep the names they have in the model.
    """

    def gathers(self, model: PreTrainedModel) -> None:
        """Have ZeRO 3 make the final layer's weights whole here, also those tied to an embedding."""
        for parameter in final_layer(model).parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(
        self,
        model: PreTrainedModel,
        hidden_ND: Tensor,
        inside: Inside,
        labels_N: Tensor,
        teacher: Rows | None,
        objective: Any,
        around: tuple[Tensor, nn.ModuleDict],
    ) -> Divergence:
        return objective(Rows(hidden_ND, head_of(model), inside), teacher, labels_N, *around)


class Engine:
    """Forward, backward, clip and step of one student, `accumulation` micro-batches a step."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: Config,
        world: World,
        accumulation: int,
        learned: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.world, self.accumulation = world, accumulation
        student = Student(model, learned)
        groups = _parameter_groups(student, config.optim.weight_decay)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        self.work = work_of(model)  # before ZeRO 3 splits the weights
        if config.engine.zero_stage == 3:
            student.last.gathers(model)
        settings = deepspeed_settings(config, world, accumulation)
        self._engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=settings)

    @property
    def student(self) -> Student:
        """The student without the engine, for forward passes that nothing is learnt from. Collective in stage 3."""
        return self._engine.module

    @property
    def model(self) -> PreTrainedModel:
        """The student's weights as they are now, in the dtype of training; in stage 3 this rank's parts of them."""
        return self.student.model

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the whole model, on rank 0; empty elsewhere. Collective.

        In stage 3 a copy in the memory of the host, made weight by weight; tied weights share theirs.
        """
        state = self.model.state_dict(keep_vars=True)
        if self._engine.zero_optimization_stage() == 3:
            whole = {id(p): self._gathered(p) for p in self.model.parameters()}
            state = {name: whole.get(id(tensor), tensor) for name, tensor in state.items()}
        return {name: tensor.detach() for name, tensor in state.items()} if self.world.is_main else {}

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True) if self.world.is_main else parameter

    def forward(
        self, inputs: Inputs, rows_N: Tensor, labels_N: Tensor, teacher: Rows | None, objective: Any
    ) -> Divergence:
        """Sums of the objective over the rows of one micro-batch."""
        return self._engine(inputs, rows_N, labels_N, teacher, objective)

    def backward(self, loss_sum: Tensor, global_count: float) -> None:
        """Gradients of loss_sum / global_count, summed over micro-batches and ranks.

        DeepSpeed averages gradients over ranks, so the sum is scaled up by their number; it must not divide
        by accumulation too.
        """
        self._engine.backward(loss_sum * (self.world.size / global_count), scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-step, changes no weight

    def step(self, lr: float) -> float | Tensor:
        """Clip, update the weights with learning rate `lr`, forget the gradients.

        Returns the norm of the gradient before clipping.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._engine.zero_optimization_stage() > 0:
            self._engine.step()
            return self._engine.get_global_grad_norm()
        # In stage 0 DeepSpeed keeps whole gradients, and tells no norm of them.
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()
        return norm

    def save(self, folder: Path) -> None:
        """Weights and optimizer state of all ranks into `folder`. Collective."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """What `save` left, at the same number of ranks. Collective. Raises ValueError if it can't be read."""
        advice = "remove that folder to go on from an earlier checkpoint"
        try:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder} can't be read ({error}): {advice}") from error
        if loaded is None:
            raise ValueError(f"{folder} holds no engine state: {advice}")


def deepspeed_settings(config: Config, world: World, accumulation: int) -> dict[str, Any]:
    """The few DeepSpeed knobs that are ours, as its config dictionary."""
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.engine.dtype == "bf16"},
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------------------ teacher


def partitioned(build: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model whose trunk is dealt over the ranks (ZeRO 3): they gather a layer when they come to it.

    `build` makes it without weights, which `own_part` then takes. The head stays whole on each rank: the divergence
    reads it in chunks, of which ranks have unequal numbers, so it can't be gathered there. Collective.
    """
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # No weight outlives its use, or a swap of the parts would leave the old one in place.
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
        "steps_per_print": 1_000_000_000,
    }
    # Buffers, such as rotary frequencies, keep their dtype, and torch keeps its own linear.
    on_device = [DeepSpeedTensorOverride.device]
    with deepspeed.zero.Init(
        config_dict_or_path=settings, mem_efficient_linear=False, tensor_overrides=on_device
    ):
        model = build()
    _unpartition_head(model)
    model.requires_grad_(False).eval()
    deepspeed.initialize(model=model.base_model, config=settings)
    return model


def _unpartition_head(model: PreTrainedModel) -> None:
    """Make whole what stands outside the trunk, also a weight that is tied to one in it."""
    trunk = set(model.base_model.modules())
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)) if module not in trunk else ():
            part, shape, _ = own_part(p)
            fresh.setdefault(id(p), nn.Parameter(part.new_zeros(shape)))
            setattr(module, name, fresh[id(p)])


def own_part(tensor: Any) -> tuple[Tensor, tuple[int, ...], int]:
    """(this rank's part, flat, to be overwritten in place; shape of the whole; index of the part's first element)."""
    if not hasattr(tensor, "ds_tensor"):
        return tensor.data.view(-1), tuple(tensor.shape), 0
    part = tensor.ds_tensor.data.view(-1)
    return part, tuple(tensor.ds_shape), torch.distributed.get_rank() * part.numel()


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """fp32 weights of the model from what `Engine.save` left, by name, without starting an engine."""
    if any((folder / TAG).glob("*_optim_states.pt")):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
    else:  # ZeRO 0 keeps the weights whole, with the optimizer beside them
        path = folder / TAG / "mp_rank_00_model_states.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)["module"]
    prefix = "model."  # what an objective has learnt beside the model stays behind
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
