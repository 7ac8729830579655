"""The engine with pipeline stages: DeepSpeed's PipelineModule and its 1F1B schedule."""

import contextlib
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec as PipeLayer
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from neox.config import Config
from neox.errors import ConfigError
from neox.model.attention import AttentionContext, with_shared_mask
from neox.model.block import TransformerBlock
from neox.model.build import WeightSource, layer_builder, meta_decoder
from neox.model.embedding import Embedding
from neox.model.head import OutputHead
from neox.model.layers import LayerSpec, layer_list
from neox.model.loss import Targets
from neox.model.positions import share_tables
from neox.parallel.mesh import Mesh
from neox.training.batches import GlobalBatch
from neox.training.compilation import compile_blocks
from neox.training.deepspeed_settings import check_settings
from neox.training.engine import Engine, join_deepspeed, start_deepspeed
from neox.training.recompute import segment_length, segment_runner


class PipelineEngine(Engine):
    """Each stage holds a stretch of the list of layers."""

    def __init__(self, config: Config, mesh: Mesh, source: WeightSource) -> None:
        self.config = config
        self.mesh = mesh
        check_settings(config)
        join_deepspeed()
        module = StagedDecoder(config, mesh, source)
        compile_blocks((m for m in module.modules() if isinstance(m, TransformerBlock)), config, mesh)
        self.deepspeed = start_deepspeed(module, config, mesh)
        sum_norms_of_all_stages(self.deepspeed.optimizer, mesh)
        self._length = config.model.seq_length

    def train_step(self, batch: GlobalBatch) -> torch.Tensor:
        """See Engine."""
        self.accumulate(len(batch.micro_batches))
        self._expect(batch)
        return self.deepspeed.train_batch(data_iter=batch.pipeline_items())

    def loss_before_update(self) -> torch.Tensor | None:
        """See Engine; only the last stage computes one."""
        engine = self.deepspeed
        return engine.total_loss / engine.gradient_accumulation_steps() if engine.is_last_stage() else None

    def _evaluate(self, batch: GlobalBatch) -> torch.Tensor:
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


def sum_norms_of_all_stages(optimizer: Any, mesh: Mesh) -> None:
    """Have each stage take part in the norms of as many parameter groups as any stage has.

    To find the norm of the gradient, DeepSpeed's ZeRO 1 sums one group after another over the stages, and would wait
    for ever for a stage with fewer: one with the head alone, say, or under Muon one with blocks alone.
    """
    if not hasattr(optimizer, "scaled_global_norm"):
        return  # DeepSpeed's bf16 optimizer sums all groups at once
    own, most = len(optimizer.param_groups), torch.tensor(len(optimizer.param_groups), device=mesh.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    norm_of_own, missing = optimizer.scaled_global_norm, int(most) - own
    of_nothing = (
        partial(optimizer.complete_grad_norm_calculation_for_cpu_offload, [])
        if optimizer.cpu_offload
        else partial(optimizer.get_grad_norm_direct, [], [])
    )

    def norm_of_all() -> torch.Tensor:
        return cast(torch.Tensor, combine_grad_norm_groups([norm_of_own(), *(of_nothing() for _ in range(missing))]))

    if missing:
        optimizer.scaled_global_norm = norm_of_all


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
        share_tables(self)

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

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """What DeepSpeed sums the gradients of over both ends; nothing where the tied matrix is frozen."""
        return [(weight, group) for weight, group in super().get_tied_weights_and_groups() if weight.requires_grad]

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


Contexts = MutableMapping[torch.Tensor, AttentionContext]
"""The context of each micro-batch under way, by its documents, so that the blocks of a stage share the mask."""


class _WithDocuments(nn.Module):
    """A layer whose input is packed: it runs in the context of the documents and passes them on."""

    def __init__(self, layer: nn.Module, contexts: Contexts) -> None:
        super().__init__()
        self.layer = layer
        self.contexts = contexts

    def forward(self, packed: Packed) -> Packed | torch.Tensor:
        """Call the layer; only the final norm lets the documents go."""
        x, documents_BS, positions_BS = packed
        if isinstance(self.layer, Embedding):
            return _embed_packed(self.layer, packed)
        if not isinstance(self.layer, TransformerBlock):
            return cast(torch.Tensor, self.layer(x))
        if documents_BS not in self.contexts:
            context = AttentionContext(positions_BS=positions_BS, documents_BS=documents_BS)
            self.contexts[documents_BS] = with_shared_mask(context, self.layer.attention, x)
        return self.layer(x, self.contexts[documents_BS]), documents_BS, positions_BS


def _embed_packed(embedding: nn.Module, packed: Packed) -> Packed:
    tokens_BS, documents_BS, positions_BS = packed
    return embedding(tokens_BS, positions_BS), documents_BS, positions_BS


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
    contexts: Contexts = WeakTensorKeyDictionary()
    layers: list[PipeLayer | Callable[..., Any]] = [
        _NamedLayer(kind, partial(_build_packed, builder, contexts) if packed else builder)
        for kind, builder in zip(kinds, builders, strict=True)
    ]
    if config.model.no_weight_tying:
        layers[-1] = _NamedLayer(kinds[-1], lambda: _AwaitingTargets(builders[-1]()))
        return layers
    layers[0] = _TiedLayer(kinds[0], "word_embeddings.weight", _embed_packed if packed else _call, builders[0])
    layers[-1] = _TiedLayer(kinds[-1], "final_linear.weight", _let_through, builders[-1])
    return layers


def _build_packed(builder: Callable[[], nn.Module], contexts: Contexts) -> nn.Module:
    return _WithDocuments(builder(), contexts)


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
