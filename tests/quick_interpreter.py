"""Makes Triton's interpreter remember what it works out anew with every operation: types, their shapes, its patches.

An interpreted kernel of a thousand columns spends most of its time so, and not on the columns. The numbers are made by
the interpreter's own code: tests/test_quick_interpreter.py compares them bit by bit.
"""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

# What was replaced: of what, by which name, and what it was.
REPLACED: list[tuple[Any, str, Any]] = []


def switch_on() -> None:
    """Does so in this process; without Triton, where it is not interpreted, or a second time, it does nothing."""
    if REPLACED:
        return
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton import language as tl
        from triton.runtime import interpreter
        from triton.runtime.interpreter import TritonSemantic
    except ImportError:
        return
    known = ("_get_np_dtype", "_patch_lang", "_LangPatchScope", "InterpretedFunction", "interpreter_semantic")
    if not all(hasattr(interpreter, name) for name in known) or not hasattr(interpreter.InterpretedFunction, "rewrite"):
        return  # of another Triton than 3.6 to 3.9: it is slower, and right
    remember_types(tl.core)
    remember_numpy_types(tl.core, interpreter)
    leave_what_is_right(TritonSemantic)
    remember_operands(tl.core, TritonSemantic)
    skip_overflow_checks(interpreter.interpreter_semantic.builder)
    remember_patches(interpreter)


def replace(owner: Any, name: str, value: Any) -> None:
    REPLACED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def remember_types(core: Any) -> None:
    """There is one type of each block, and the shape of its tensors is worked out once."""
    make, begin, equal = core.tensor.__init__, core.block_type.__init__, core.dtype.__eq__
    blocks: dict[Any, Any] = {}

    def of_known_type(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_of_tensors")
        if known is None:
            make(self, handle, type)
            type.__dict__["_of_tensors"] = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known

    def block(cls: Any, element_ty: Any, shape: Any) -> Any:
        if type(element_ty) is not core.dtype:  # pointers are told apart by more than a name
            return object.__new__(cls)
        key = element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key not in blocks:
            blocks[key] = object.__new__(cls)
        return blocks[key]

    def begin_once(self: Any, element_ty: Any, shape: Any) -> None:
        if not self.__dict__:
            begin(self, element_ty, shape)

    replace(core.tensor, "__init__", of_known_type)
    core.block_type.__new__ = block
    REPLACED.append((core.block_type, "__new__", lambda cls, *given: object.__new__(cls)))
    replace(core.block_type, "__init__", begin_once)
    replace(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))


def remember_numpy_types(core: Any, interpreter: Any) -> None:
    """One look instead of a table that is built with every operation."""
    find, found = interpreter._get_np_dtype, {}

    def numpy_type(of: Any) -> Any:
        if type(of) is not core.dtype:
            return find(of)
        if of.name not in found:
            found[of.name] = find(of)
        return found[of.name]

    replace(interpreter, "_get_np_dtype", numpy_type)


def leave_what_is_right(semantic: Any) -> None:
    """Two blocks of one shape are not broadcast, and what has the dtype is not cast."""
    broadcast, cast = semantic.broadcast_impl_value, semantic.cast

    def unless_alike(self: Any, one: Any, other: Any) -> Any:
        a, b = one.type, other.type
        alike = a is b or (a.is_block() and b.is_block() and a.shape.values == b.shape.values)
        return (one, other) if alike else broadcast(self, one, other)

    def unless_it_is(self: Any, value: Any, dtype: Any, *rounding: Any) -> Any:
        return value if value.dtype is dtype else cast(self, value, dtype, *rounding)

    replace(semantic, "broadcast_impl_value", unless_alike)
    replace(semantic, "cast", unless_it_is)


def remember_operands(core: Any, semantic: Any) -> None:
    """A number has one block of each type, and operands of two types that were left as they are once are left."""
    check = semantic.binary_op_type_checking_impl
    known: dict[Any, Any] = {}  # what stands for either operand, None for itself, and types, which keep their ids

    def of(operand: Any) -> Any:
        if type(operand) is core.tensor and type(operand.dtype) is core.dtype:  # no pointer
            return id(operand.type)
        return (type(operand), operand or repr(operand)) if type(operand) in (int, float) else None  # 0.0 and -0.0

    def checked(self: Any, one: Any, other: Any, *flags: Any, **named: Any) -> Any:
        key = of(one), of(other), flags, *named.items()
        if key in known:
            a, b, _ = known[key]
            return one if a is None else a, other if b is None else b
        pair = check(self, one, other, *flags, **named)
        kept = [new is given or type(given) is not core.tensor for new, given in zip(pair, (one, other), strict=True)]
        if all(kept) and None not in key[:2]:
            stand_in = [None if new is given else new for new, given in zip(pair, (one, other), strict=True)]
            for number in stand_in:
                if number is not None:
                    number.handle.data.flags.writeable = False
            known[key] = *stand_in, [tensor.type for tensor in pair]
        return pair

    replace(semantic, "binary_op_type_checking_impl", checked)


def skip_overflow_checks(builder: Any) -> None:
    """Integers are computed a second time in 64 bits to find whether they overflow, which only a debugger is told."""
    if not builder.options.debug:
        replace(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))


def remember_patches(interpreter: Any) -> None:
    """triton.language is looked through once, and each launch makes the same replacements, for all functions in it."""
    patch, tl = interpreter._patch_lang, interpreter.tl
    changes: list[tuple[Any, str, Any]] = []
    live: list[Any] = []
    semantic = interpreter.interpreter_semantic

    def direct(replacement: Any) -> Any:
        """A function of the language without the two that only hand it its last argument."""
        function = getattr((getattr(replacement, "__kwdefaults__", None) or {}).get("member"), "__wrapped__", None)
        if function is None:
            return replacement
        return lambda *given, _semantic=None, **named: function(*given, **named, _semantic=semantic)

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            live.remove(self)

    def patch_lang(function: Any) -> Any:
        if live:
            return interpreter._LangPatchScope()
        if not changes:
            scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            changes.extend((owner, name, direct(getattr(owner, name))) for owner, name, _ in scope._changes)
            scope.restore()
        live.append(Scope())
        for change in changes:
            live[0].set_attr(*change)
        return live[0]

    replace(interpreter, "_patch_lang", patch_lang)
    replace(
        interpreter.InterpretedFunction, "__call__", lambda self, *given, **options: self.rewrite()(*given, **options)
    )
