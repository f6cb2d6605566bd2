"""Which layers of a model can be masked, and why others cannot."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from .._checks import FLOAT_DTYPES
from ._layer import FrozenLayer
from .sequential import has_hooks

FilterFn = Callable[[str, nn.Module], bool]
Plain = nn.Linear | nn.Conv2d
METADATA = ("dtype", "device", "shape", "size", "ndim", "dim", "numel")


def is_plain(module: nn.Module | None) -> bool:
    """Whether ``module`` computes what ``nn.Linear`` or ``nn.Conv2d`` does: one of them, or of a
    subclass that leaves their forward alone.
    """
    if isinstance(module, nn.Conv2d):
        return _inherits(module, nn.Conv2d, "forward", "_conv_forward")
    return isinstance(module, nn.Linear) and _inherits(module, nn.Linear, "forward")


def find_targets(
    model: nn.Module, filter_fn: FilterFn | None, prototype: bool
) -> tuple[dict[str, Plain], dict[str, str]]:
    """The layers to mask, and for every other module with a weight the reason, by name.

    ``prototype`` says that the masked layers will have no weight of their shape.
    """
    readers, users = _readers(model, prototype), _users(model)
    targets: dict[str, Plain] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _has_weight(module):
            continue
        reason = readers.get(module) or _why_not(name, module, users)
        if reason is None and filter_fn is not None and not filter_fn(name, module):
            reason = "filter_fn returned False"
        if reason is None:
            assert isinstance(module, Plain)
            targets[name] = module
        else:
            skipped[name] = reason
    return targets, skipped


def _has_weight(module: nn.Module) -> bool:
    """Matrices and filters count, also those of quantised modules, which are no parameters; the
    vectors of norms do not.
    """
    if isinstance(module, Plain | FrozenLayer):
        return True
    named = [p for n, p in module._parameters.items() if p is not None and "weight" in n]
    if any(is_lazy(p) or p.dim() > 1 for p in named):
        return True
    weight = getattr(module, "weight", None)
    return weight is not None and not isinstance(weight, Tensor | nn.Module)


def _why_not(name: str, module: nn.Module, users: dict[int, list[str]]) -> str | None:
    kind = type(module).__name__
    if kind in ("Linear", "Conv2d"):  # a quantised one, for example
        kind = f"{type(module).__module__}.{kind}"
    if isinstance(module, FrozenLayer):
        return "it has a mask already"
    if not isinstance(module, Plain):
        return f"{kind} has no masked form"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return f"{kind} has no weight before its first call"
    for parameter in ("weight", "bias"):  # missing where parametrized, or set by a hook
        if parameter not in module._parameters:
            return f"its {parameter} is computed from other parameters"
    if not is_plain(module):
        return f"{kind} has a forward of its own"
    if has_hooks(module):
        return "it has hooks, which a new layer would not have"
    weight = module.weight
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}"
    for parameter, tensor in module._parameters.items():
        others = [] if tensor is None else users[_memory(tensor)]
        others = [other for other in others if other != f"{name}.{parameter}"]
        if others:
            return f"its {parameter} is also {others[0]}"
    return None


def _inherits(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Neither its class nor the instance itself replaces the methods."""
    return all(
        getattr(getattr(module, method), "__func__", None) is getattr(kind, method)
        for method in methods
    )


def _users(model: nn.Module) -> dict[int, list[str]]:
    """The names of all parameters at a place in memory, those of a module under its first name."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter, tensor in module._parameters.items():
            if tensor is not None and not is_lazy(tensor):
                users.setdefault(_memory(tensor), []).append(f"{name}.{parameter}".lstrip("."))
    return users


def _memory(tensor: Tensor) -> int:
    """Tied parameters may be two objects, a transposed view for example; those without memory are
    told apart by being one object.
    """
    try:
        return tensor.data_ptr() or id(tensor)
    except RuntimeError:  # a subclass that has no memory of its own
        return id(tensor)


def _readers(model: nn.Module, prototype: bool) -> dict[nn.Module, str]:
    """The layers whose weight another module's forward reads past the layer's own, where a mask
    would go unseen, and the reason to skip them. To read no more than its dtype or shape is
    harmless unless the masked layer has no weight.
    """
    readers: dict[nn.Module, str] = {}
    for parent in model.modules():
        kind: Any = type(parent)
        for path, values in _weights_read(kind).items():
            try:
                child = parent.get_submodule(path)
            except AttributeError:
                continue
            if not isinstance(child, Plain):
                continue
            if values:
                readers[child] = f"{kind.__name__}.forward reads its weight"
            elif prototype:
                asks = f"{kind.__name__}.forward asks what its weight is"
                readers.setdefault(child, f"{asks}, and a layer of a prototype has none")
    return readers


@cache
def _weights_read(kind: Any) -> dict[str, bool]:
    """The paths for which the source of ``kind.forward``, or of a method that it uses, reads
    ``self.PATH.weight``; False if no more of it than its type, dtype, device or shape.

    None of nn.TransformerEncoderLayer: it reads in its fused inference alone, which
    ``forbid_fused_encoders`` turns off.
    """
    reads: dict[str, bool] = {}
    if getattr(kind, "forward", None) is nn.TransformerEncoderLayer.forward:
        return reads
    methods = ["forward"]
    for method in methods:  # grows
        asked: set[ast.AST] = set()
        for node in ast.walk(_parse(getattr(kind, method, None))):  # outer nodes first
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked.update(node.args)
            if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Store):
                continue
            if node.attr in METADATA:
                asked.add(node.value)
            start, *names = ast.unparse(node).split(".")
            if start != "self":
                continue
            if len(names) > 1 and names[-1] == "weight":
                path = ".".join(names[:-1])
                reads[path] = reads.get(path, False) or node not in asked
            elif len(names) == 1 and _is_own_method(kind, names[0]) and names[0] not in methods:
                methods += names
    return reads


def _is_own_method(kind: Any, name: str) -> bool:
    return inspect.isfunction(getattr(kind, name, None)) and not hasattr(nn.Module, name)


def _parse(function: Any) -> ast.AST:
    """An empty module where there is no source, as of code made at run time."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def forbid_fused_encoders(model: nn.Module) -> None:
    """Keep torch's transformer encoders around masked layers from their fused inference, which
    reads the layers' weights itself.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            continue
        if any(isinstance(layer, FrozenLayer) for layer in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            else:
                module.use_nested_tensor = False
