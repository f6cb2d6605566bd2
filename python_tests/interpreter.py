"""Triton's interpreter, twice as fast."""


def patch_once_a_launch() -> None:
    """Let only the first device function that a launch calls in a module search it.

    At every call of one the interpreter looks through all of triton.language for functions that it
    has yet to replace, which takes most of its time. They stay replaced until the launch ends.
    """
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # a version of Triton that goes about it differently
    patch = interpreter._patch_lang
    patched: set[int] = set()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            """Called when a launch ends; what a call of a device function replaced stays."""
            patched.clear()
            super().restore()

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return None  # which a device function ignores, and a launch never sees
        scope = patch(function)
        patched.add(module)
        return scope

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_once
