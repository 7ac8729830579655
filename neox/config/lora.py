"""LoRA: small trainable factors beside frozen matrices (Hu et al. 2021)."""

from neox.config.keys import Float, Int, Key, Section, Strings, setting
from neox.config.model import ModelConfig
from neox.config.problems import Problems, did_you_mean

LINEARS = ("attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2")
"""The matrices of a block, as checkpoints name them."""

_EXAMPLE = "add rank: 8"


class LoraConfig(Section):
    """Which matrices are adapted, and how."""

    rank: Int = setting(0, "Rank of the trainable update of each target; absent: no LoRA.", key="lora.rank", ge=0)
    alpha: Float = setting(16.0, "The update is multiplied by alpha / rank.", key="lora.alpha", gt=0)
    dropout: Float = setting(0.0, "Dropout on the input of the update.", key="lora.dropout", ge=0, lt=1)
    targets: Strings = setting(
        LINEARS,
        "Matrices to adapt: query_key_value, dense, linear1, linear2, or attention, mlp for both of each.",
        key="lora.targets",
        rule="Experts cannot be adapted: with moe_num_experts above 1 attention only, which is then what absent means.",
    )

    @property
    def is_on(self) -> bool:
        """Whether the run trains factors, and nothing else."""
        return self.rank > 0

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank


def resolve_lora(lora: LoraConfig, model: ModelConfig, problems: Problems) -> LoraConfig:
    """Spell out the targets as names of matrices, in the order of `LINEARS`."""
    if lora.model_fields_set and "rank" not in lora.model_fields_set:
        problems.add("lora.rank", f"not set, and lora has {sorted(lora.model_fields_set)[0]}; {_EXAMPLE}")
    if lora.rank > model.hidden_size:
        problems.add("lora.rank", f"{lora.rank} is above hidden_size {model.hidden_size}; lower it")
    if not lora.targets:
        problems.add("lora.targets", "empty, so nothing would be trained; remove it to adapt every matrix")
    chosen = set()
    for target in lora.targets:
        found = [name for name in LINEARS if target in (name, *name.split("."))]
        if not found:
            mend = did_you_mean(target, _target_names()) or f"; choose from {', '.join(_target_names())}"
            problems.add("lora.targets", f"{target!r} is no matrix of a block{mend}")
        chosen.update(found)
    if model.has_experts and "targets" not in lora.model_fields_set:
        chosen = {name for name in chosen if name.startswith("attention.")}
    for name in sorted(chosen) if model.has_experts else ():
        if name.startswith("mlp."):
            problems.add("lora.targets", f"{name} cannot be adapted in a model with experts; set targets: [attention]")
    return lora.model_copy(update={"targets": tuple(name for name in LINEARS if name in chosen)})


def _target_names() -> list[str]:
    return [name.rpartition(".")[2] for name in LINEARS] + ["attention", "mlp"]


OTHER_KEYS: tuple[Key, ...] = ()
