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
from distill.distributed import World, any_text
from distill.head import Pooled
from distill.kernels import Divergence, SparseTargets
from distill.memory import BUCKET
from distill.models import Inputs, Inside, Rows, counted_hidden, final_layer, head_of, work_of
from distill.pruning import Pruning
from distill.zero_files import KEYS, ZeroFiles

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

# DeepSpeed would compile this C++ op at every first start (half a minute); only its inference code calls it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# What its files hold beside tensors: they are read without running code of theirs.
torch.serialization.add_safe_globals([fragment_address, LossScaler, ZeroStageEnum])

log = logging.getLogger(__name__)
TAG = "engine"
Signal = Rows | Pooled | SparseTargets  # what the teacher says of the rows that count


class Student(nn.Module):
    """The student as the engine sees it: a micro-batch and what the teacher says in, the objective's sums out.

    learned: what an objective learns beside the model, as projections of hidden states. It is optimized and saved
    with the model, and never exported.
    """

    def __init__(self, model: PreTrainedModel, learned: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.model, self.last = model, FusedHead()
        self.learned = nn.ModuleDict(learned)

    def forward(
        self, inputs: Inputs, rows_N: Tensor, labels_N: Tensor, teacher: Signal | None, objective: Any
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
        teacher: Signal | None,
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
        student = Student(model, learned).train()  # a model that was loaded comes in eval mode
        groups = _parameter_groups(student, config.optim.weight_decay)
        optim = config.optim
        optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
        )
        self.work = work_of(model)  # before ZeRO 3 splits the weights
        self._pruning = Pruning(model, config)
        if config.engine.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.engine.compile:
            model.base_model.compile()
        names = {id(p): name for name, p in student.named_parameters()}
        self._parameters = {names[id(p)]: p for group in groups for p in group["params"]}
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
        if self.zero_stage == 3:
            whole = {id(p): self._gathered(p) for p in self.model.parameters()}
            state = {name: whole.get(id(tensor), tensor) for name, tensor in state.items()}
        return {name: tensor.detach() for name, tensor in state.items()} if self.world.is_main else {}

    def trained(self) -> tuple[PreTrainedModel, dict[str, Tensor]]:
        """The model to export and its state dict, without the units that were pruned; on rank 0. Collective."""
        weights = self.weights()
        return self._pruning.cut(self.model, weights) if self.world.is_main else (self.model, weights)

    @property
    def units_left(self) -> dict[str, int]:
        """Of those that are pruned, by kind, in each layer."""
        return self._pruning.left

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True) if self.world.is_main else parameter

    def forward(
        self, inputs: Inputs, rows_N: Tensor, labels_N: Tensor, teacher: Signal | None, objective: Any
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
        """Clip, update the weights with learning rate `lr`, forget the gradients; prune what is due.

        Returns the norm of the gradient before clipping.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._pruning.step(self.world)
        if self.zero_stage > 0:
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
        if self.world.is_main:
            self._pruning.save(folder)

    @property
    def zero_stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    def load(self, folder: Path, ranks: int, zero_stage: int) -> None:
        """What `save` left, with `ranks` ranks in `zero_stage`: to the bit into the same layout, else dealt anew.

        Collective. Raises ValueError if it can't be read.
        """
        # No RuntimeError: that is memory or another rank, not the files, which were found whole.
        try:
            self._pruning.load(folder)
            if (ranks, zero_stage) == (self.world.size, self.zero_stage):
                loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
                if loaded is None:
                    raise OSError("no engine state in it")
            else:
                self._deal_anew(folder / TAG, ranks, zero_stage)
        except (OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{folder} can't be read ({error}): if its run was of another model or version, choose another run_dir"
            ) from error

    @torch.no_grad()
    def _deal_anew(self, folder: Path, ranks: int, zero_stage: int) -> None:
        """Rank 0 makes each parameter whole from the files of another layout, and every rank takes its part of it."""
        if self.world.is_main:
            layouts = (ranks, zero_stage, self.world.size, self.zero_stage)
            log.info("saved by %d rank(s) in ZeRO %d, dealt anew to %d rank(s) in ZeRO %d", *layouts)
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in self._parameters.items()}
        files, fault = None, ""
        if self.world.is_main:
            try:
                files = ZeroFiles(folder, zero_stage, ranks, list(sizes))
                files.refuse_other(sizes)
            except (OSError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
                fault = str(error)
        # Told by all ranks, or the others would wait for the first tensor.
        if fault := any_text(fault, self.world):
            raise ValueError(fault)
        step = self._from_main(torch.tensor(files.step if files else 0.0))
        if self.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_prologue()  # weights that are whole everywhere are split too
        self._make_moments(step)
        for name, parameter in self._parameters.items():
            whole = files.whole(name, sizes[name]) if files else [torch.empty(sizes[name]) for _ in KEYS]
            for key, values in zip(KEYS, whole, strict=True):
                self._set(parameter, key, self._from_main(values.float()))
        if self.zero_stage == 3:
            self._engine.optimizer.checkpoint_event_epilogue()
        elif self.zero_stage:
            self._engine.optimizer.update_lp_params()

    def _from_main(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.world.device)
        if self.world.size > 1:
            torch.distributed.broadcast(tensor, src=0)
        return tensor

    def _make_moments(self, step: Tensor) -> None:
        """AdamW's state as after `step` steps, for which it would wait until the first one; the moments still zero."""
        zero = self._engine.optimizer
        if self.zero_stage == 0:
            optimizer, held = zero, list(self._parameters.values())
        elif self.zero_stage == 3:
            optimizer, held = zero.optimizer, zero.fp32_partitioned_groups_flat
        else:
            optimizer, held = zero.optimizer, zero.single_partition_of_fp32_groups
        for tensor in held:
            moments = {key: torch.zeros_like(tensor, requires_grad=False) for key in KEYS[1:]}
            optimizer.state[tensor] = {"step": step.to(tensor.device, copy=True), **moments}
        if self.zero_stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()  # where safe_set_full_optimizer_state looks

    def _set(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """Give this rank its part of one parameter's weights, or of a moment; `whole` is flat and fp32."""
        if self.zero_stage == 0:
            state = self._engine.optimizer.state[parameter]
            (parameter if key == "weights" else state[key]).copy_(whole.view_as(parameter))
        elif self.zero_stage < 3 and key == "weights":
            safe_set_full_fp32_param(parameter, whole)
        elif self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, whole, key)
        else:  # DeepSpeed's setter of whole tensors stumbles where they don't divide by the ranks
            part, _, first = own_part(parameter)
            missing = max(first + part.numel() - whole.numel(), 0)
            own = nn.functional.pad(whole, (0, missing))[first : first + part.numel()]
            if key == "weights":
                part.copy_(own)
                safe_set_local_fp32_param(parameter, own)
            else:
                safe_set_local_optimizer_state(parameter, own, key)


def deepspeed_settings(config: Config, world: World, accumulation: int) -> dict[str, Any]:
    """The few DeepSpeed knobs that are ours, as its config dictionary."""
    offload = {"device": "cpu" if config.engine.offload_optimizer else "none", "pin_memory": True}
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world.size // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.engine.dtype == "bf16"},
        # DeepSpeed's own bucket takes 0.93 GiB in bf16, whatever the model's size.
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "reduce_bucket_size": BUCKET,
            "offload_optimizer": offload,
        },
        # torch's fused AdamW does offloaded steps in C++ too, on all cores, and is there without a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------------------ teacher


def partitioned(
    build: Callable[[], PreTrainedModel], dtype: torch.dtype, offload: bool = False
) -> PreTrainedModel:
    """A frozen model whose trunk is dealt over the ranks (ZeRO 3): they gather a layer when they come to it.

    `build` makes it without weights, which `own_part` then takes. The head stays whole on each rank: the divergence
    reads it in chunks, of which ranks have unequal numbers, so it can't be gathered there. Collective.
    offload: the ranks' parts lie in pinned host memory, and go to the device to be gathered.
    """
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # No weight outlives its use, or a swap of the parts would leave the old one in place.
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "offload_param": {"device": "cpu" if offload else "none", "pin_memory": True},
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
    trunk, device = set(model.base_model.modules()), get_accelerator().current_device_name()
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)) if module not in trunk else ():
            part, shape, _ = own_part(p)
            fresh.setdefault(id(p), nn.Parameter(part.new_zeros(shape, device=device)))
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
