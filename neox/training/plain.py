"""The engine without pipeline stages: any tensor-parallel and data-parallel size, ZeRO 0 to 3."""

import torch
import torch.distributed as dist
from torch import nn

from neox.config import Config, deepspeed_dict
from neox.model.build import WeightSource, layer_builder
from neox.model.layers import Decoder, layer_list
from neox.parallel.mesh import Mesh
from neox.pulse import pulse
from neox.training.batches import GlobalBatch
from neox.training.compilation import compile_blocks
from neox.training.deepspeed_settings import check_settings
from neox.training.engine import Engine, join_deepspeed, mean_over_data, start_deepspeed
from neox.training.objectives.objective import NextToken, Objective, mean_figures
from neox.training.recompute import segment_length, segment_runner


class PlainEngine(Engine):
    """Runs the whole list of layers in every process."""

    def __init__(self, config: Config, mesh: Mesh, source: WeightSource, objective: Objective | None = None) -> None:
        self.objective = objective or NextToken()
        self.config = config
        self.mesh = mesh
        self.stage = config.parallel.zero_stage
        self.clip = config.optimizer.gradient_clipping
        check_settings(config)
        model = self._build(source)
        # In fp32 without ZeRO the norm is ours, over all tensor-parallel ranks; DeepSpeed must not clip again.
        changes = {"gradient_clipping": 0.0} if self.stage == 0 else {}
        self.deepspeed = start_deepspeed(model, config, mesh, **changes)
        if self.stage == 0 and mesh.data_size == 1:
            # DeepSpeed would copy every gradient into a flat buffer and back, for nobody.
            self.deepspeed.enable_backward_allreduce = False
        self._norm: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []

    def _build(self, source: WeightSource) -> Decoder:
        """Make each layer, divided over tensor ranks and at ZeRO 3 over data ranks; then recompute and compile."""
        config, mesh = self.config, self.mesh
        build, layers = layer_builder(config, mesh, source), []
        for spec in layer_list(config.model):
            layer = build(spec)
            if self.stage == 3:
                divide_parameters(layer, config, mesh)
            layers.append(layer)
        model = Decoder(config.model, layers=layers)
        model.recompute_every, model.run_segment = segment_length(config), segment_runner(config)
        compile_blocks(model.blocks, config, mesh)
        if self.stage == 3 and not config.model.has_reward_head:
            import deepspeed

            # The loss uses this matrix without calling the module that owns it.
            deepspeed.zero.register_external_parameter(model.head, model.head.final_linear.weight)
        return model

    def train_step(self, batch: GlobalBatch) -> torch.Tensor:
        """See Engine."""
        engine = self.deepspeed
        engine.train()
        self.accumulate(len(batch.micro_batches))
        self._losses, figures = [], []
        for inputs in batch.micro_batches:
            pulse()
            loss, measured = self.objective(engine, inputs)
            self._losses.append(loss.detach())
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary():
                self.gradients_complete()
                if self.stage == 0:
                    self._clip_gradients()
            engine.step()
            figures.append(measured)
        self.figures = mean_figures(figures, self.mesh)
        return mean_over_data(torch.stack(self._losses).mean(), self.mesh)

    def loss_before_update(self) -> torch.Tensor:
        """See Engine."""
        return torch.stack(self._losses).mean()

    def _evaluate(self, batch: GlobalBatch) -> torch.Tensor:
        """See Engine."""
        self.deepspeed.eval()
        with torch.no_grad():
            results = [self.objective(self.deepspeed, inputs) for inputs in batch.micro_batches]
        self.deepspeed.train()
        self.figures = mean_figures([figures for _, figures in results], self.mesh)
        return mean_over_data(torch.stack([loss for loss, _ in results]).mean(), self.mesh)

    @property
    def gradient_norm(self) -> torch.Tensor | float | None:
        """See Engine; at ZeRO 0 DeepSpeed keeps none, so it is ours."""
        return self._norm if self.stage == 0 else super().gradient_norm

    def _clip_gradients(self) -> None:
        """Norm over all parts of the gradient, each once, and scaling by clip / norm where that is below 1."""
        sharded: list[torch.Tensor] = []
        replicated: list[torch.Tensor] = []
        for parameter in self.deepspeed.module.parameters():
            if parameter.grad is not None:
                (sharded if parameter.tensor_model_parallel else replicated).append(parameter.grad)
        square = _square_norm(sharded, self.mesh.device)
        if self.mesh.tensor_size > 1:
            dist.all_reduce(square, group=self.mesh.tensor_group)
        self._norm = (square + _square_norm(replicated, self.mesh.device)).sqrt()
        if self.clip > 0.0:
            scale = (self.clip / (self._norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([*sharded, *replicated], scale)


def divide_parameters(layer: nn.Module, config: Config, mesh: Mesh) -> None:
    """Leave only this rank's part of each parameter (ZeRO 3), so that no rank ever holds more than a layer whole."""
    import deepspeed
    from deepspeed.utils import groups

    join_deepspeed()
    deepspeed.zero.Init(
        module=layer,
        data_parallel_group=mesh.data_group,
        config_dict_or_path=deepspeed_dict(config),
        mpu=mesh if mesh.tensor_size > 1 else None,
        # The group of zero_hpz_partition_size ranks, which the first layer's call makes.
        zero_param_parallel_group=groups._get_zero_param_intra_parallel_group(),
    )


def _square_norm(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
