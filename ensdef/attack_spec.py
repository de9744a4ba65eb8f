"""An attack as it will be run: name, parameters, norm, radius, and how success is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ensdef.codehash import code_hash
from ensdef.combine import COMBINERS
from ensdef.errors import UsageError
from ensdef.keys import non_default
from ensdef.notation import convert, fill, format_call, parse_call, parse_eps
from ensdef.registry import ATTACKS

Success = Literal["any", "last"]
Search = Literal["fp32", "bf16", "bf16+fp32"]


@dataclass(frozen=True)
class AttackSpec:
    """An attack with all parameters filled in, as the harness runs it."""

    name: str
    params: Mapping[str, Any]
    norm: str | None
    eps: str | None
    success: Success = "any"
    search: Search = "fp32"
    combiner: str = "native"
    seed: int = 0
    #: The radius as the user wrote it; ``eps`` is the reduced fraction, which alone enters keys.
    written: str | None = None

    @classmethod
    def create(
        cls,
        name: str,
        params: Mapping[str, Any],
        norm: str,
        eps: str | float,
        *,
        dimensions: int | None = None,
        search: str = "fp32",
        combiner: str = "native",
        seed: int = 0,
    ) -> AttackSpec:
        """Check and fill in; ``params`` may hold ``success`` beside the attack's own parameters.

        An attack whose search bf16 would spoil searches in fp32, whatever ``search`` is.

        Raises:
            UsageError: unknown attack or parameter, or a norm or radius it cannot be run at.
        """
        attack = ATTACKS.get(name)
        params = dict(params)
        success = convert(params.pop("success", "any"), Success, f"{name}[success]")
        resolved = fill(attack.Params, params, name)
        mode: Search = convert(search, Search, "search")
        if not attack.low_precision:
            mode = "fp32"
        if combiner != "native" and combiner not in COMBINERS:
            raise UsageError(f"unknown combiner {combiner!r}; expected native, {', '.join(COMBINERS)}")
        if attack.budget == "none":
            return cls(name, dataclasses.asdict(resolved), None, None, success, mode, combiner, seed)
        try:
            radius = parse_eps(eps, norm, dimensions)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
        for call in attack.made_of(resolved):
            other, given = parse_call(call)
            try:
                cls.create(other, given, norm, eps, dimensions=dimensions)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None
        norms = attack.norms_for(resolved)
        if norm not in norms:
            asked = format_call(name, non_default(attack.Params, dataclasses.asdict(resolved)))
            raise UsageError(f"{asked} cannot be run in {norm}; it has: {', '.join(norms)}")
        return cls(
            name, dataclasses.asdict(resolved), norm, str(radius), success, mode, combiner, seed, str(eps).strip()
        )

    @property
    def eps_value(self) -> float | None:
        """The radius as a float."""
        return None if self.eps is None else float(parse_eps(self.eps, "linf" if self.norm is None else self.norm))

    @property
    def params_object(self) -> Any:
        """The parameters as the attack's own dataclass."""
        return ATTACKS.get(self.name).Params(**self.params)

    @property
    def call(self) -> str:
        """The attack as a user writes it."""
        extra = {} if self.success == "any" else {"success": self.success}
        return format_call(self.name, {**non_default(ATTACKS.get(self.name).Params, self.params), **extra})

    def identity(self) -> dict[str, Any]:
        """What enters a cell's key."""
        attack = ATTACKS.get(self.name)
        described = {key: value for key, value in dataclasses.asdict(self).items() if key != "written"}
        used = {name: code_hash(ATTACKS.get(name)) for name in attack.uses(self.params_object)}
        code = {"code": code_hash(attack), **({"uses": used} if used else {})}
        return {**described, **code, "batch": getattr(attack, "batch_size", None)}
