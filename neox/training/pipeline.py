"""The engine with pipeline stages: DeepSpeed's PipelineModule and its 1F1B schedule."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from deepspeed.pipe import LayerSpec as PipeLayer
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from neox.config import Config
from neox.errors import ConfigError
from neox.model.attention import AttentionContext
from neox.model.block import TransformerBlock
from neox.model.build import WeightSource, layer_builder, meta_decoder
from neox.model.embedding import Embedding
from neox.model.head import OutputHead
from neox.model.layers import LayerSpec, layer_list
from neox.model.loss import Targets
from neox.parallel.mesh import Mesh
from neox.training.batches import GlobalBatch
from neox.training.compilation import compile_blocks
from neox.training.engine import Engine, join_deepspeed, start_deepspeed
from neox.training.recompute import segment_length, segment_runner


class PipelineEngine(Engine):
    """Each stage holds a stretch of the list of layers."""

    def __init__(self, config: Config, mesh: Mesh, source: WeightSource) -> None:
        self.config = config
        self.mesh = mesh
        join_deepspeed()
        module = StagedDecoder(config, mesh, source)
        compile_blocks((m for m in module.modules() if isinstance(m, TransformerBlock)), config, mesh)
        self.deepspeed = start_deepspeed(module, config, mesh)
        self._length = config.model.seq_length

    def train_step(self, batch: GlobalBatch) -> torch.Tensor:
        """See Engine."""
        self.accumulate(len(batch.micro_batches))
        self._expect(batch)
        return self.deepspeed.train_batch(data_iter=batch.pipeline_items())

    def evaluate(self, batch: GlobalBatch) -> torch.Tensor:
        """See Engine."""
        count = len(batch.micro_batches)
        self._expect(batch)
        loss = self.deepspeed.eval_batch(data_iter=batch.pipeline_items(), reduce_output="avg", num_micro_batches=count)
        return loss.detach().float().reshape(())

    def watch_gradients(self, watcher: Callable[[], None]) -> None:
        """See Engine; here DeepSpeed runs a whole step, so the update itself tells."""
        if not self.watchers:
            optimizer = self.deepspeed.optimizer
            update = optimizer.step

            def tell_and_update(*args: Any, **options: Any) -> Any:
                self.gradients_complete()
                return update(*args, **options)

            optimizer.step = tell_and_update
        super().watch_gradients(watcher)

    def _expect(self, batch: GlobalBatch) -> None:
        """Let the stages forget the shape of what they pass on where the length changes."""
        if batch.length != self._length:
            self.deepspeed.reset_activation_shape()
        self._length = batch.length


class StagedDecoder(PipelineModule):
    """The list of layers divided over the pipeline; each rank builds only its own."""

    def __init__(self, config: Config, mesh: Mesh, source: WeightSource) -> None:
        build = layer_builder(config, mesh, source)
        specs = layer_list(config.model)
        self._sizes = _layer_sizes(config)
        kinds = ["Embedding", *["TransformerBlock"] * config.model.num_layers, "FinalNorm", "OutputHead"]
        # DeepSpeed prints the whole list of stages to the standard output.
        with contextlib.redirect_stdout(None):
            self._divide(config, mesh, _pipe_layers(config, specs, kinds, build))
        check_stages(config, self.parts)

    def _divide(self, config: Config, mesh: Mesh, layers: list[PipeLayer | Callable[..., Any]]) -> None:
        super().__init__(
            layers=layers,
            topology=PipeModelDataParallelTopology(
                num_pp=mesh.pipe_size, num_mp=mesh.tensor_size, num_dp=mesh.data_size
            ),
            loss_fn=self._loss,
            partition_method=config.parallel.pipe_partition_method,
            activation_checkpoint_interval=segment_length(config),
            activation_checkpoint_func=segment_runner(config),
        )

    def _loss(
        self,
        hidden_and_weight: tuple[torch.Tensor, torch.Tensor],
        labels_and_weights: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Called on the last stage with what its head let through: projection and loss in one."""
        head = next(m for m in self.modules() if isinstance(m, OutputHead))
        return head.loss(*hidden_and_weight, Targets(*labels_and_weights))

    def _count_layer_params(self) -> list[int]:
        """Sizes for the `parameters` partition, from the meta device: DeepSpeed would build every layer."""
        return self._sizes


Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""What stages pass on in a run with `document_masking`: hidden states or tokens, documents_BS, positions_BS."""


class _WithDocuments(nn.Module):
    """A layer whose input is packed."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, packed: Packed) -> Packed | torch.Tensor:
        """See _call_packed."""
        return _call_packed(self.layer, packed)


def _call_packed(layer: nn.Module, packed: Packed) -> Packed | torch.Tensor:
    """Run a layer in the context of the documents, and pass them on; only the final norm lets them go."""
    x, documents_BS, positions_BS = packed
    if isinstance(layer, Embedding):
        return layer(x, positions_BS), documents_BS, positions_BS
    if isinstance(layer, TransformerBlock):
        context = AttentionContext(positions_BS=positions_BS, documents_BS=documents_BS)
        return layer(x, context), documents_BS, positions_BS
    return cast(torch.Tensor, layer(x))


class _NamedLayer(PipeLayer):
    """A layer of the list as DeepSpeed wants it: built on demand, matched by class name when stages are balanced."""

    def __init__(self, kind: str, build: Callable[[], nn.Module]) -> None:
        super().__init__(type(kind, (nn.Module,), {}))
        self._build_layer = build

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer on this rank."""
        return self._build_layer()


class _TiedLayer(TiedLayerSpec):
    """One end of the tied embedding; its matrix is kept equal to the other end's by DeepSpeed."""

    def __init__(self, kind: str, weight: str, forward: Callable[..., Any], build: Callable[[], nn.Module]) -> None:
        super().__init__("embedding", type(kind, (nn.Module,), {}), forward_fn=forward, tied_weight_attr=weight)
        self._build_layer = build

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer on this rank."""
        return self._build_layer()


def _pipe_layers(
    config: Config, specs: list[LayerSpec], kinds: list[str], build: Callable[[LayerSpec], nn.Module]
) -> list[PipeLayer | Callable[..., Any]]:
    """DeepSpeed's list. The head only lets the hidden state through here: the loss uses it with the targets."""
    packed = config.data.document_masking
    builders = [partial(build, spec) for spec in specs]
    layers: list[PipeLayer | Callable[..., Any]] = [
        _NamedLayer(kind, partial(_build_packed, builder) if packed else builder)
        for kind, builder in zip(kinds, builders, strict=True)
    ]
    if config.model.no_weight_tying:
        layers[-1] = _NamedLayer(kinds[-1], lambda: _AwaitingTargets(builders[-1]()))
        return layers
    layers[0] = _TiedLayer(kinds[0], "word_embeddings.weight", _call_packed if packed else _call, builders[0])
    layers[-1] = _TiedLayer(kinds[-1], "final_linear.weight", _let_through, builders[-1])
    return layers


def _build_packed(builder: Callable[[], nn.Module]) -> nn.Module:
    return _WithDocuments(builder())


class _AwaitingTargets(nn.Module):
    """Holds the head on the last stage until the loss is asked for."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See _let_through."""
        return _let_through(self.head, hidden_BSD)


def _call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, module(x))


def _let_through(head: nn.Module, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state, and the matrix of the head as an output of the stage.

    DeepSpeed's bf16 optimizer clears the 16-bit gradients when the first gradient of a stage's outputs arrives. Were
    the matrix not among the outputs, its gradient would come before that and be lost.
    """
    weight = cast(OutputHead, head).final_linear.weight
    return hidden_BSD, weight.view_as(weight)


def _layer_sizes(config: Config) -> list[int]:
    return [sum(p.numel() for p in layer.parameters()) for layer in meta_decoder(config.model).layers.values()]


def check_stages(config: Config, bounds: Sequence[int]) -> None:
    """Check that every stage has something to train: with LoRA, a block.

    Args:
        config: the run.
        bounds: stage s holds the layers of the list from `bounds[s]` to before `bounds[s + 1]`.

    Raises:
        ConfigError: a stage has none.
    """
    blocks = range(1, 1 + config.model.num_layers)
    for stage, (start, end) in enumerate(pairwise(bounds)):
        if config.lora.is_on and not any(layer in blocks for layer in range(start, end)):
            raise ConfigError(
                f"pipe_partition_method: {config.parallel.pipe_partition_method!r} leaves stage {stage} without a "
                "block, so lora has nothing to train there; set type:transformer, or fewer stages"
            )
