"""Classes that somebody made from a rule's since optimize(): parametrizations, FSDP2, their own."""

from __future__ import annotations

from typing import Any

from .fast import dotted


def restored_class(cls: Any, rule: Any) -> Any:
    """`cls`, which is `rule` or made from it, as made from the class that the rule replaces.

    Raises TypeError where a method of such a class calls super(), which means the class as it is.
    """
    if cls is rule:
        return rule.replaces
    if not issubclass(cls, rule):
        return cls
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "replaces")}
    for name, value in own.items():
        function = getattr(value, "fget", getattr(value, "__func__", value))
        if "__class__" in getattr(getattr(function, "__code__", None), "co_freevars", ()):
            raise TypeError(
                f"restore: {dotted(cls)} is made from {rule.__name__}, and its {name}() calls "
                f"super(); set the module's class to {rule.__name__} again, then restore"
            )
    name = cls.__name__.replace(rule.__name__, rule.replaces.__name__)
    return type(cls)(name, tuple(restored_class(base, rule) for base in cls.__bases__), own)
