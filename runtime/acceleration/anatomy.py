"""What hasten finds in a model: decoder layers, their projections, gated MLPs, fused experts, the head. From the
structure; names are in `families`."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import nn

from hasten.acceleration.experts import layout_of, why_not
from hasten.acceleration.families import NOT_PICKED, ROLES
from hasten.acceleration.gated_mlps import gated_mlp, gated_names, is_gated, unlike_gated
from hasten.acceleration.image_tokens import ImageTokens, image_tokens
from hasten.acceleration.linear_maps import elsewhere, is_linear, linear_maps, poses_as_linear, unfit
from hasten.acceleration.parts import Block, Experts, GatedMLP, Projection, is_stock, join, kind_of
from hasten.acceleration.uses import Use
from hasten.acceleration.vision_tower import VisionTower, vision_tower
from hasten.errors import Refusal, UnsupportedModelError

PARTS = ("linears", "shared", "gated_mlps", "experts", "head")


class Anatomy:
    """What hasten found in a model. Every part is found when it is asked for, and only then its refusals are collected.

    Attributes:
        model: the model.
        uses: how a pass of the model calls its modules, from `hasten.acceleration.uses`; without, every projection
            passes for one that is called once.
    """

    def __init__(self, model: nn.Module, uses: Mapping[str, Use] | None = None):
        self.model = model
        self._found = _Found(model, uses or {})
        self._asked: dict[str, None] = {}
        self._left_out: frozenset[str] = frozenset()

    def without(self, names: Collection[str]) -> "Anatomy":
        """The same anatomy with these projections, experts, gated MLPs or this head taken out,
        and what is made of them."""
        other = Anatomy.__new__(Anatomy)
        other.model, other._found, other._asked = self.model, self._found, self._asked
        other._left_out = self._left_out | frozenset(names)
        return other

    @property
    def model_type(self) -> str:
        """That of the text decoder, or of the model where the decoder has none."""
        config = getattr(self._found.decoder[1], "config", None) or getattr(self.model, "config", None)
        return str(getattr(config, "model_type", None))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder layers, in order, with those of their projections that are in `called_once`.

        Raises:
            UnsupportedModelError: the model has none.
        """
        self._ask("linears", "shared")
        taken = {projection.name for projection in self.called_once}
        return tuple(
            Block(
                name,
                module,
                tuple(p for p in self._found.linears[name] if p.name in taken),
                self._kept_mlps(mlp for mlp in self._found.gated_mlps if f"{mlp.name}.".startswith(f"{name}.")),
                self._kept(self._found.experts[name]),
            )
            for name, module in self._found.layers.items()
        )

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Every projection of every layer, without the head, and without those that share their weight
        with another module."""
        self._ask("linears", "shared")
        return self._kept(p for p in self._found.all_linears if p.name not in self._found.shared)

    @property
    def called_once(self) -> tuple[Projection, ...]:
        """`projections` without those that a pass of the model calls several times: for what depends on the
        distribution of their inputs."""
        return tuple(p for p in self.projections if p.name not in self._found.repeated)

    @property
    def repeated(self) -> tuple[Refusal, ...]:
        """Why those that are called several times are not among `called_once`."""
        return tuple(r for r in self._found.repeated.values() if r.name not in self._left_out)

    @property
    def with_shared(self) -> tuple[Projection, ...]:
        """`projections`, and those that share their weight: for what is exact and leaves the weight as it is stored. A
        module with several paths appears once, under the first."""
        self._ask("linears")
        first = {projection.module: projection for projection in reversed(self._found.all_linears)}
        return self._kept(p for p in self._found.all_linears if first[p.module] is p)

    @property
    def gated_mlps(self) -> tuple[GatedMLP, ...]:
        """Every gated MLP of projections in `called_once` whose forward is down(act(gate(x)) * up(x)),
        which is tried on a few rows."""
        self._ask("gated_mlps")
        return self._kept_mlps(self._found.gated_mlps)

    @property
    def experts(self) -> tuple[Experts, ...]:
        """Every fused mixture of experts whose layout hasten knows, without those that share a weight."""
        self._ask("experts")
        return self._kept(experts for block in self._found.experts.values() for experts in block)

    @property
    def head(self) -> Projection | None:
        """What makes logits of hidden states; None if that is not one linear map, or refused.

        Raises:
            UnsupportedModelError: the model has no head.
        """
        self._ask("head")
        head = self._found.head
        return None if head is None or head.name in self._left_out else head

    @property
    def decoder(self) -> nn.Module:
        """The module that holds the decoder layers.

        Raises:
            UnsupportedModelError: the model has none.
        """
        return self._found.decoder[1]

    @property
    def images(self) -> ImageTokens:
        """The tokens of a prompt that stand for images, and the decoder layers that they pass.

        Raises:
            UnsupportedModelError: the model has none.
        """
        return self._found.images

    def was_run(self, name: str) -> bool:
        """Whether the pass that was watched ran anything below the module of this path; it ran all where none was."""
        below = [use for path, use in self._found.uses.items() if f"{path}.".startswith(f"{name}.")]
        return not below or any(use.calls for use in below)

    @property
    def vision_tower(self) -> VisionTower:
        """What sees the pictures.

        Raises:
            UnsupportedModelError: the model has none whose attention can be listened to.
        """
        return self._found.vision_tower

    def modules(self, classes: Collection[str]) -> dict[str, nn.Module]:
        """The modules of transformers' own `classes` (of names without their module), by their paths, in order."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if type(module).__name__ in classes and is_stock(module)
        }

    def refuse(self, refusal: Refusal) -> None:
        """Adds what a technique finds that it cannot change."""
        self._found.refusals.setdefault("techniques", []).append(refusal)
        self._asked.setdefault("techniques")

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Why modules are not among the parts that were asked for so far."""
        refusals = (refusal for part in self._asked for refusal in self._found.refusals[part])
        return tuple(dict.fromkeys(refusal for refusal in refusals if refusal.name not in self._left_out))

    def _ask(self, *parts: str) -> None:
        for part in parts:
            getattr(self._found, part)
            self._asked.setdefault(part)

    def _kept(self, parts: Iterable) -> tuple:
        return tuple(part for part in parts if part.name not in self._left_out)

    def _kept_mlps(self, mlps: Iterable[GatedMLP]) -> tuple[GatedMLP, ...]:
        return tuple(mlp for mlp in self._kept(mlps) if not self._left_out & {p.name for p in mlp.projections})


class _Found:
    """The parts of a model and the refusals of each, found once."""

    def __init__(self, model: nn.Module, uses: Mapping[str, Use]):
        self.model, self.uses = model, uses
        self.refusals: dict[str, list[Refusal]] = {part: [] for part in PARTS}

    @cached_property
    def chain(self) -> list[tuple[str, nn.Module]]:
        """The model, its text decoder, the decoder of that, and so on, with their paths."""
        names = {module: name for name, module in self.model.named_modules()}
        chain = [self.model]
        while hasattr(chain[-1], "get_decoder") and (inner := chain[-1].get_decoder()) in names and inner not in chain:
            chain.append(inner)
        return [(names[module], module) for module in chain]

    @cached_property
    def decoder(self) -> tuple[str, nn.Module]:
        """The innermost module of the chain that holds decoder layers, and its path."""
        for name, module in reversed(self.chain):
            if _layer_lists(module):
                return name, module
        kind, config = type(self.model).__qualname__, getattr(self.model, "config", None)
        reason = f"it has no list of decoder layers (its model_type is {getattr(config, 'model_type', None)!r})"
        raise UnsupportedModelError("", kind, reason, "pass a transformers model that makes text, as ...ForCausalLM")

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        name, decoder = self.decoder
        return {
            join(name, below, str(i)): layer
            for below, layers in _layer_lists(decoder).items()
            for i, layer in enumerate(layers)
        }

    @cached_property
    def images(self) -> ImageTokens:
        return image_tokens(self.model, self.layers)

    @cached_property
    def vision_tower(self) -> VisionTower:
        return vision_tower(self.model)

    @cached_property
    def linears(self) -> dict[str, tuple[Projection, ...]]:
        """The projections of every layer that hasten can read and replace, by the layer's path."""
        found: dict[str, tuple[Projection, ...]] = {}
        device: tuple[torch.device, str] | None = None
        for name, layer in self.layers.items():
            kept = []
            for path, module in linear_maps(name, layer):
                refusal = unfit(path, module)
                if refusal is None:
                    device = device or (module.weight.device, path)
                    refusal = elsewhere(path, module, *device)
                if refusal is None and path in self.uses and self.uses[path].bypasses:
                    reason = "the model reads its weight without calling it, and so would pass by what takes its place"
                    refusal = Refusal(path, kind_of(module), reason, "leave it as it is with strict=False")
                if refusal is None:
                    kept.append(Projection(path, ROLES.get(path.removeprefix(f"{name}.")), module))
                else:
                    self.refusals["linears"].append(refusal)
            found[name] = tuple(kept)
        return found

    @cached_property
    def repeated(self) -> dict[str, Refusal]:
        """Why projections that are called several times in one pass cannot be calibrated, by their paths."""
        repeated = {}
        for projection in self.all_linears:
            calls = self.uses[projection.name].calls if projection.name in self.uses else 1
            if calls > 1 and projection.name not in self.shared:
                reason = f"it is called {calls} times in one forward pass, on inputs of different kinds"
                remedy = "use hasten.DenseDecode, or strict=False"
                repeated[projection.name] = Refusal(projection.name, kind_of(projection.module), reason, remedy)
        return repeated

    @cached_property
    def all_linears(self) -> tuple[Projection, ...]:
        return tuple(projection for block in self.linears.values() for projection in block)

    @cached_property
    def owners(self) -> dict[int, list[str]]:
        """By the address of a weight: the paths of all projections, all experts and all other modules that hold it."""
        owners: dict[int, list[str]] = {}
        parts = [*self.all_linears, *(experts for block in self.fused.values() for experts in block)]
        for part in parts:
            for parameter in part.module.parameters():
                owners.setdefault(parameter.data_ptr(), []).append(part.name)
        inside = {module for part in parts for module in part.module.modules()}
        for name, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                if module not in inside and parameter.data_ptr() in owners:
                    owners[parameter.data_ptr()].append(name)
        return owners

    @cached_property
    def shared(self) -> dict[str, Refusal]:
        """Why the projections that share their weight are refused by what changes it, by their paths."""
        owners = self.owners
        shared, first = {}, {}
        for projection in self.all_linears:
            name, others = projection.name, owners[projection.weight.data_ptr()]
            if len(others) > 1:
                other = next(other for other in others if other != name)
                reason = f"it shares its weight with {other}"
                shared[name] = Refusal(name, kind_of(projection.module), reason, "give each module its own weights")
                first[name] = others[0] == name
        self.refusals["shared"] += sorted(shared.values(), key=lambda refusal: first[refusal.name])
        return shared

    @cached_property
    def fused(self) -> dict[str, tuple[Experts, ...]]:
        """The fused experts of every layer, whatever their layout, by the layer's path."""
        return {
            name: tuple(
                Experts(path, module)
                for path, module in _all_below(name, layer)
                if (layout_of(module) or why_not(module)) and type(module).__name__ not in NOT_PICKED
            )
            for name, layer in self.layers.items()
        }

    @cached_property
    def experts(self) -> dict[str, tuple[Experts, ...]]:
        found = {}
        for name, fused in self.fused.items():
            kept = []
            for experts in fused:
                if refusal := self._unfit_experts(experts):
                    self.refusals["experts"].append(refusal)
                else:
                    kept.append(experts)
            found[name] = tuple(kept)
        return found

    def _unfit_experts(self, experts: Experts) -> Refusal | None:
        kind = kind_of(experts.module)
        if reason := why_not(experts.module):
            return Refusal(experts.name, kind, reason, "leave it to transformers with strict=False")
        for parameter in experts.module.parameters():
            other = next((owner for owner in self.owners[parameter.data_ptr()] if owner != experts.name), None)
            if other:
                reason = f"it shares a weight with {other}"
                return Refusal(experts.name, kind, reason, "give each module its own weights")
        return None

    @cached_property
    def gated_mlps(self) -> tuple[GatedMLP, ...]:
        projections = {projection.name: projection for projection in self.all_linears}
        refusals = {r.name: r for r in self.refusals["linears"]} | self.shared | self.repeated
        alike: set[tuple] = set()
        found = []
        for layer_name, layer in self.layers.items():
            for name, module in _all_below(layer_name, layer):
                names = gated_names(module)
                if names is None:
                    continue
                inner = [join(name, projection) for projection in names.projections]
                refusal = next((refusals[path] for path in inner if path in refusals), None)
                if refusal is None:
                    if not all(path in projections for path in inner) or not is_gated(names, name, projections):
                        continue
                    mlp = gated_mlp(name, module, names, projections)
                    refusal = mlp if isinstance(mlp, Refusal) else unlike_gated(mlp, alike)
                    if refusal is None:
                        found.append(mlp)
                if refusal is not None:
                    self.refusals["gated_mlps"].append(refusal)
        return tuple(found)

    @cached_property
    def head(self) -> Projection | None:
        candidates = (m.get_output_embeddings() for _, m in self.chain if hasattr(m, "get_output_embeddings"))
        module = next((module for module in candidates if module is not None), None)
        if module is None:
            kind = type(self.model).__qualname__
            raise UnsupportedModelError("", kind, "it has no language-model head", "pass the ...ForCausalLM model")
        name = next(name for name, candidate in self.model.named_modules() if candidate is module)
        if not is_linear(module) and (is_stock(module) or not poses_as_linear(module)):
            return None
        refusal = unfit(name, module)
        if refusal is None and self.all_linears:
            first = self.all_linears[0]
            refusal = elsewhere(name, module, first.module.weight.device, first.name)
        if refusal is not None:
            self.refusals["head"].append(refusal)
            return None
        return Projection(name, "head", module)


def _layer_lists(decoder: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of layers that `decoder` holds itself: the outermost, for those deeper down are experts,
    or belong to an encoder of something else."""
    lists = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and any(_is_layer(item) for item in module)
    }
    depth = min((name.count(".") for name in lists), default=0)
    return {name: module for name, module in lists.items() if name.count(".") == depth}


def _is_layer(module: nn.Module) -> bool:
    """Whether it is made of modules with weights, unlike an embedding, a norm or a lone projection."""
    children = (tensor for child in module.children() for tensor in (*child.parameters(), *child.buffers()))
    return any(tensor.dim() >= 2 for tensor in children)


def _all_below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`module` and every module below it, with their paths, of which one module can have several."""
    for below, inner in module.named_modules(remove_duplicate=False):
        yield join(name, below), inner
