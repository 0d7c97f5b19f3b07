"""The PEFT tuner: one trainable delta a cluster of neurons, everything else frozen (paper section 3.5).

For a projection W [d_out, d_in] with selected rows i and their clusters c(i), the tuned projection is
W'[i, :] = W[i, :] + U[c(i), :], U [k, d_in] zero at the start. Beyond the paper, the ties may be learned too:
W'[i, :] = W[i, :] + sum over c of T[i, c] U[c, :], T [rows, k] one-hot at the start. Importing this module teaches PEFT
the type "NEST".

While an adapter is active the moved rows stand in the weight itself: the forward pass is the base layer's, what is
trained is what will ship, rounding included, and only the backward pass does more than the frozen model's. A weight
that is not an ordinary tensor (sharded, quantised) cannot be written so; there the moved outputs are added instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional

from nest_rs.patch import tied

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nest_rs.neurons import SiteNeurons

NEST = "NEST"


@dataclass
class NestConfig(PeftConfig):  # type: ignore[misc]  # peft ships no type marker
    """Which neurons move, and which of them move together.

    Attributes:
        neurons: For each module path, `rows` (distinct row numbers of its weight) and `cluster` (as long as `rows`;
            the cluster of each row, from 0, none empty).
        learn_ties: Whether each row learns how far it follows each delta of its matrix; otherwise it follows its
            cluster's alone.
        target_modules: Filled from `neurons`.

    Raises:
        ValueError: rows and clusters do not match, repeat, or leave a cluster empty.
    """

    neurons: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    learn_ties: bool = False
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NEST
        for module, chosen in self.neurons.items():
            rows, cluster = chosen["rows"], chosen["cluster"]
            if len(rows) != len(cluster) or not rows:
                raise ValueError(f"`{module}` has {len(rows)} rows and {len(cluster)} clusters; give one cluster a row")
            if len(set(rows)) != len(rows) or min(rows) < 0:
                raise ValueError(f"the rows of `{module}` must be distinct and not negative")
            if set(cluster) != set(range(max(cluster) + 1)):
                raise ValueError(f"the clusters of `{module}` must be numbered from 0 without a gap")
        self.target_modules = list(self.neurons)

    @classmethod
    def from_neurons(cls, neurons: Mapping[str, SiteNeurons], **kwargs: Any) -> NestConfig:
        """Build a config from selected and clustered neurons, keyed by module path."""
        chosen = {
            module: {"rows": site.rows.tolist(), "cluster": site.cluster.tolist()} for module, site in neurons.items()
        }
        return cls(neurons=chosen, **kwargs)


class _TiedGradient(torch.autograd.Function):
    """Passes a layer's output through, and in the backward pass gives the deltas and ties behind it their gradient.

    With G = dL/dW of the moved rows, [rows, d_in]: dL/dU = T^T G and dL/dT = G U^T.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, rows: torch.Tensor, tie: torch.Tensor
    ) -> Any:
        ctx.save_for_backward(x, rows, tie, delta)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        x, rows, tie, delta = ctx.saved_tensors
        moved = gradient.flatten(0, -2).T[rows]  # [rows, tokens]
        by_row = (moved @ x.flatten(0, -2).to(moved.dtype)).to(tie.dtype)
        of_tie = by_row @ delta.to(tie.dtype).T if ctx.needs_input_grad[4] else None
        return gradient, None, tie.T @ by_row, None, of_tie


class NestLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer some of whose output rows carry a shared trainable delta."""

    if TYPE_CHECKING:  # peft carries no types
        active_adapters: list[str]
        merged_adapters: list[str]
        nest_rows: Any
        nest_cluster: Any
        nest_tie: Any
        nest_fixed_tie: Any
        _move_adapter_to_device_of_base_layer: Callable[[str], None]
        set_adapter: Callable[..., None]
        _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    adapter_layer_names = ("nest_delta", "nest_tie")
    other_param_names = ("nest_rows", "nest_cluster", "nest_fixed_tie")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        rows: list[int],
        cluster: list[int],
        learn_ties: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.nest_delta = nn.ParameterDict({})
        self.nest_tie = nn.ParameterDict({})
        self.nest_rows = BufferDict({}, persistent=False)
        self.nest_cluster = BufferDict({}, persistent=False)
        self.nest_fixed_tie = BufferDict({}, persistent=False)
        self.merged_adapters = []
        self._original_rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        weight = self._weight
        if type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
            # The mark stays on this very tensor: one that replaces it (a shard gathered for a moment) has none.
            weight.nest_writable = True  # type: ignore[attr-defined]
        # What is saved, and what `get_base_layer` hands out, is the base.
        self.register_state_dict_pre_hook(lambda module, *_: module._restore_active())  # type: ignore[no-untyped-call]
        self.update_layer(adapter_name, rows, cluster, learn_ties)

    @property
    def _weight(self) -> torch.Tensor:
        weight: torch.Tensor = super().get_base_layer().weight
        return weight

    def get_base_layer(self) -> nn.Linear:
        """The frozen layer, with its own rows unless adapters are merged."""
        self._restore_active()
        layer: nn.Linear = super().get_base_layer()
        return layer

    def update_layer(
        self,
        adapter_name: str,
        rows: list[int],
        cluster: list[int],
        learn_ties: bool = False,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter: k zero deltas for the given rows."""
        base = self.get_base_layer()
        if max(rows) >= base.out_features:
            raise ValueError(f"row `{max(rows)}` is out of range for a layer of {base.out_features} rows")
        self.nest_delta[adapter_name] = nn.Parameter(torch.zeros(max(cluster) + 1, base.in_features))
        self.nest_rows[adapter_name] = torch.tensor(rows, dtype=torch.long)
        self.nest_cluster[adapter_name] = torch.tensor(cluster, dtype=torch.long)
        tie = functional.one_hot(self.nest_cluster[adapter_name]).float()
        if learn_ties:
            self.nest_tie[adapter_name] = nn.Parameter(tie)
        else:
            self.nest_fixed_tie[adapter_name] = tie
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., d_in] -> [..., d_out], of which the adapters' rows alone differ from the base's."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            self._restore_active()
            output: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return output
        adapters = [adapter for adapter in self.active_adapters if adapter in self.nest_delta]
        if not self._is_writable():
            return self._added(adapters, x, *args, **kwargs)
        # Written anew each time: it costs little, and a delta may have changed in any way since.
        if len(adapters) != 1 or not self._is_alone(adapters[0]):
            self._restore_active()
        for adapter in adapters:
            self._write(adapter)
        output = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            delta = self.nest_delta[adapter]
            if torch.is_grad_enabled() and delta.requires_grad:
                output = _TiedGradient.apply(output, x, delta, self.nest_rows[adapter], self.tie(adapter))
        return output

    def tie(self, adapter: str) -> torch.Tensor:
        """How far each row follows each delta, T [rows, k]; one-hot where ties are not learned."""
        ties = self.nest_tie if adapter in self.nest_tie else self.nest_fixed_tie
        tie: torch.Tensor = ties[adapter]
        return tie

    def row_deltas(self, adapter: str) -> torch.Tensor:
        """What each row moves by, [rows, d_in] float32."""
        learned = self.nest_tie[adapter].detach().float() if adapter in self.nest_tie else None
        moved: torch.Tensor = tied(self.nest_delta[adapter].detach().float(), self.nest_cluster[adapter], learned)
        return moved

    def _is_writable(self) -> bool:
        weight = self._weight
        # A weight that DeepSpeed partitions keeps its identity and loses its storage between uses.
        return hasattr(weight, "nest_writable") and not hasattr(weight, "ds_id") and not torch.compiler.is_compiling()

    def _added(self, adapters: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same outputs by a k-wide product, added to the moved columns in place; for any kind of base layer."""
        self._restore_active()
        output: torch.Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            delta = self.nest_delta[adapter]
            moved = functional.linear(self._cast_input_dtype(x, delta.dtype), delta)
            if adapter in self.nest_tie:
                shared = functional.linear(moved, self.nest_tie[adapter].to(moved.dtype)).to(output.dtype)
            else:
                shared = moved.to(output.dtype).index_select(-1, self.nest_cluster[adapter])
            output.index_add_(-1, self.nest_rows[adapter], shared)
        return output

    def _write(self, adapter: str) -> None:
        """Move an adapter's rows in the weight: added in float32, rounded once to the weight's dtype."""
        rows, weight = self.nest_rows[adapter], self._weight.data
        if not self._is_alone(adapter):
            # Subtracting would not give back the bits (rounding), so the rows themselves are kept.
            self._original_rows.append((rows, weight[rows]))
        original = self._original_rows[-1][1]
        weight.index_copy_(0, rows, (original.float() + self.row_deltas(adapter)).to(weight.dtype))

    def _is_alone(self, adapter: str) -> bool:
        """Whether this adapter's rows, and no others, are moved."""
        return len(self._original_rows) == 1 and self._original_rows[0][0] is self.nest_rows[adapter]

    def _restore(self) -> None:
        """Put the original rows back, bit for bit."""
        while self._original_rows:
            rows, original = self._original_rows.pop()
            self._weight.data[rows] = original.to(self._weight.dtype)

    def _restore_active(self) -> None:
        if not self.merged:
            self._restore()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The dense change of the weight, [d_out, d_in] float32; zero but for the adapter's rows."""
        weight = self._weight
        dense = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        dense[self.nest_rows[adapter]] = self.row_deltas(adapter)
        return dense

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the deltas into the weight, as `forward` writes them.

        Raises:
            ValueError: `safe_merge` is set and a folded value is not finite; the weight is then as it was.
        """
        self._restore_active()
        for adapter in check_adapters_to_merge(self, adapter_names) or []:
            if adapter not in self.nest_delta:
                continue
            self._write(adapter)
            if safe_merge and not torch.isfinite(self._weight.data[self.nest_rows[adapter]]).all():
                rows, original = self._original_rows.pop()
                self._weight.data[rows] = original
                raise ValueError(f"merging the adapter `{adapter}` would write values that are not finite")
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the original rows back, bit for bit."""
        self.merged_adapters.clear()
        self._restore()

    def __repr__(self) -> str:
        return f"nest.{super().__repr__()}"


class NestModel(BaseTuner):  # type: ignore[misc]
    """Puts a `NestLinear` around each projection that a `NestConfig` names."""

    prefix = "nest_"
    tuner_layer_cls = NestLinear
    # Names are full module paths, so no per-architecture guess is needed.
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: NestConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        chosen = peft_config.neurons[current_key]
        if isinstance(target, NestLinear):
            target.update_layer(
                adapter_name, **chosen, learn_ties=peft_config.learn_ties, inference_mode=peft_config.inference_mode
            )
            return
        if not isinstance(target, nn.Linear):
            raise TypeError(f"`{current_key}` is a `{type(target).__name__}`; NEST moves rows of linear layers only")
        layer = NestLinear(target, adapter_name, **chosen, learn_ties=peft_config.learn_ties)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


# peft's PeftType is a closed enum, so register_peft_method refuses a new name; its three tables take it.
PEFT_TYPE_TO_CONFIG_MAPPING[NEST] = NestConfig
PEFT_TYPE_TO_TUNER_MAPPING[NEST] = NestModel
PEFT_TYPE_TO_PREFIX_MAPPING[NEST] = NestModel.prefix
