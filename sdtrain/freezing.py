"""What trains and at which rate: rules over canonical parameter paths, the last match wins.

What no rule matches is frozen. Frozen means: no gradient, no optimizer state, eval mode, and the
same bytes at every save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from sdprep.errors import UserError, nearest
from sdtrain.adapter import Adapter, Trained, UnsuitableError
from sdtrain.family import Family
from sdtrain.freeze_plan import FreezePlan, ParameterGroup, PlanRow
from sdtrain.globs import matches, nearest_paths


class RuleLike(Protocol):
    """One line of `train.rules`: either a learning rate (0 means frozen) or `freeze`."""

    @property
    def match(self) -> str:
        """Glob over canonical parameter or module paths."""

    @property
    def lr(self) -> float | None:
        """Learning rate of what matches."""

    @property
    def freeze(self) -> bool:
        """Whether what matches is frozen."""


@dataclass(frozen=True)
class Rule:
    """A rule that does not come from a recipe; `origin` says what it comes from instead."""

    match: str
    lr: float | None = None
    freeze: bool = False
    origin: str = ""


@dataclass(frozen=True)
class Decision:
    """Which rule won for one parameter; rate 0 is frozen."""

    rule: str
    order: int
    rate: float


NO_RULE = Decision("(no rule)", 1_000_000, 0.0)


def build_plan(
    family: Family,
    rules: Sequence[RuleLike],
    adapter: Adapter,
    *,
    lr: float | None = None,
    preset: str | None = None,
    lr_factor: float = 1.0,
) -> FreezePlan:
    """Decide on every parameter, attach the adapter, and set gradients and modes accordingly.

    Args:
        family: the model, changed in place.
        rules: the recipe's, in order; the last match wins.
        adapter: `full`, or one that adds parameters beside the modules that the rules choose.
        lr: shorthand for a first rule on `unet.**`.
        preset: shipped rules, applied after `lr` and before `rules`.
        lr_factor: every rate is multiplied by it; table and groups show the product.

    Raises:
        UserError: a rule that matches nothing, an unknown preset, or nothing would train.
    """
    base = dict(family.named_parameters())
    expanded = expand_rules(family, rules, lr=lr, preset=preset)
    decisions = _decide(family, list(base), expanded, lr_factor)
    notes = _overruled(expanded, decisions) + _freeze_dead_ends(family, base, decisions)
    if lr_factor != 1:
        notes.append(f"every rate of the recipe is multiplied by {lr_factor:.6g}")
    for parameter in base.values():
        parameter.requires_grad_(False)
    rates = {path: decision.rate for path, decision in decisions.items() if decision.rate > 0}
    try:
        trained = adapter.attach(family, rates)
    except UnsuitableError as error:
        rule = decisions[f"{error.path}.weight"].rule
        raise UserError(
            f"train rule {rule!r} chooses {error.path}, which adapter {adapter.name} cannot "
            f"train: {error.reason}",
            error.hint,
        ) from None
    _require_every_rule(adapter, base, decisions, trained)
    if not trained:
        raise UserError(
            "\n  ".join(["nothing would train: every parameter is frozen", *notes]),
            'Give train.rules a rule with a rate, such as { match = "unet.**", lr = 1e-6 }.',
        )
    for entry in trained.values():
        entry.parameter.requires_grad_(True)
    set_modes(family.parts)
    live = {id(entry.parameter) for entry in trained.values()}  # (IA)³ takes its weight's path
    return FreezePlan(
        rows=_rows(base, decisions, trained),
        groups=_groups(decisions, trained),
        frozen={path: parameter for path, parameter in base.items() if id(parameter) not in live},
        notes=notes + adapter.notes(),
    )


def expand_rules(
    family: Family,
    rules: Sequence[RuleLike],
    *,
    lr: float | None = None,
    preset: str | None = None,
) -> list[RuleLike]:
    """Every rule in order: the `lr` shorthand, the preset's, then the recipe's own.

    Raises:
        UserError: the preset is unknown to this family, or has no rate to train the rest at.
    """
    expanded: list[RuleLike] = [] if lr is None else [Rule("unet.**", lr=lr)]
    if preset is not None:
        if preset not in family.presets:
            near = nearest(preset, list(family.presets))
            raise UserError(
                f"train.preset = {preset!r} is no preset of family {family.name}",
                (f"Did you mean {near}? " if near else "")
                + f"There are: {', '.join(sorted(family.presets)) or 'none'}.",
            )
        if lr is None:
            raise UserError(
                f"train.preset = {preset!r} only says what is frozen",
                "Set train.lr, the learning rate of the rest.",
            )
        expanded += [
            Rule(glob, freeze=True, origin=f"preset {preset}") for glob in family.presets[preset]
        ]
    return [*expanded, *rules]


def describes(glob: str, path: str) -> bool:
    """Whether a glob names a parameter, or the module that owns it, by its whole path."""
    return matches(glob, path) or matches(glob, path.rpartition(".")[0])


def _decide(
    family: Family, paths: Sequence[str], rules: Sequence[RuleLike], lr_factor: float
) -> dict[str, Decision]:
    decisions = dict.fromkeys(paths, NO_RULE)
    candidates = [path for path in paths if path.split(".")[0] in family.trainable_parts]
    for order, rule in enumerate(rules):
        hits = [path for path in candidates if describes(rule.match, path)]
        if not hits:
            origin = getattr(rule, "origin", "") or "train"
            raise _matches_nothing(family, rule.match, candidates, origin)
        rate = 0.0 if rule.freeze else float(rule.lr or 0.0) * lr_factor
        decisions.update(dict.fromkeys(hits, Decision(rule.match, order, rate)))
    return decisions


def _overruled(rules: Sequence[RuleLike], decisions: Mapping[str, Decision]) -> list[str]:
    """Rules that decide on nothing, in words: all that they match later rules match, too."""
    winners = {decision.order for decision in decisions.values()}
    return [
        f"{getattr(rule, 'origin', '') or 'train'} rule {rule.match!r} decides nothing: "
        "later rules win wherever it matches"
        for order, rule in enumerate(rules)
        if order not in winners
    ]


def _matches_nothing(
    family: Family, glob: str, candidates: Sequence[str], origin: str
) -> UserError:
    part = glob.split(".")[0]
    if part in family.parts and part not in family.trainable_parts:
        hint = f"{part} never trains; there are: {', '.join(family.trainable_parts)}."
    else:
        hint = f"Nearest: {', '.join(nearest_paths(glob, candidates))}."
    message = f"{origin} rule {glob!r} matches no parameter of this {family.name} model"
    return UserError(message, hint)


def _require_every_rule(
    adapter: Adapter,
    base: Mapping[str, nn.Parameter],
    decisions: Mapping[str, Decision],
    trained: Mapping[str, Trained],
) -> None:
    """An adapter reaches only some layers; a rule must not come to nothing unseen."""
    used = {decisions[entry.owner].rule for entry in trained.values()}
    for path, decision in decisions.items():
        if decision.rate > 0 and decision.rule not in used:
            raise UserError(
                f"train rule {decision.rule!r} matches nothing that adapter {adapter.name} can "
                f"train, only such as {path} {tuple(base[path].shape)}",
                f"Its globs must match {adapter.reaches}; see [adapter], targets.",
            )


def _freeze_dead_ends(
    family: Family, base: Mapping[str, nn.Parameter], decisions: dict[str, Decision]
) -> list[str]:
    """Freeze what a rule trains although no gradient can reach it; say so."""
    notes = []
    for reason, globs in family.never_trained().items():
        dead = [
            path
            for path, decision in decisions.items()
            if decision.rate > 0 and any(matches(glob, path) for glob in globs)
        ]
        if dead:
            count = sum(base[path].numel() for path in dead)
            notes.append(f"frozen although a rule trains them: {len(dead)} tensors, {reason}")
            notes[-1] += f" ({count:,} parameters)"
        for path in dead:
            rule = f"{decisions[path].rule} (no gradient)"
            decisions[path] = Decision(rule, decisions[path].order, 0.0)
    return notes


def _rows(
    base: Mapping[str, nn.Parameter],
    decisions: Mapping[str, Decision],
    trained: Mapping[str, Trained],
) -> list[PlanRow]:
    added: dict[str, int] = {}
    for entry in trained.values():
        added[entry.owner] = added.get(entry.owner, 0) + entry.parameter.numel()
    sizes: dict[str, int] = {}
    buckets: dict[tuple[str, Decision], list[str]] = {}
    for path, parameter in base.items():
        part = path.split(".")[0]
        sizes[part] = sizes.get(part, 0) + parameter.numel()
        buckets.setdefault((part, decisions[path]), []).append(path)
    parts = list(sizes)
    order = sorted(buckets, key=lambda key: (parts.index(key[0]), key[1].order, key[1].rule))
    rows = []
    for part, decision in order:
        paths = buckets[part, decision]
        count = sum(added.get(path, 0) for path in paths)
        total = sum(base[path].numel() for path in paths)
        rows.append(
            PlanRow(
                part,
                decision.rule,
                len(paths),
                count,
                total,
                100 * count / sizes[part],
                decision.rate,
            )
        )
    return rows


def _groups(
    decisions: Mapping[str, Decision], trained: Mapping[str, Trained]
) -> list[ParameterGroup]:
    by_rule: dict[Decision, dict[str, nn.Parameter]] = {}
    for path, entry in trained.items():
        by_rule.setdefault(decisions[entry.owner], {})[path] = entry.parameter
    ordered = sorted(by_rule, key=lambda decision: decision.order)
    # Names are unique: a glob that comes twice matches the same paths, and the last one wins.
    return [ParameterGroup(d.rule, d.rate, by_rule[d]) for d in ordered]


def set_modes(parts: Mapping[str, nn.Module]) -> None:
    """Training mode for every module that holds something trainable, eval mode for the others.

    What holds no parameter at all, such as a dropout, goes with the module that it is in.
    """
    for part in parts.values():
        _set_mode(part, inherited=False)


def _set_mode(module: nn.Module, *, inherited: bool) -> None:
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else inherited
    for child in module.children():
        _set_mode(child, inherited=module.training)
