"""How our functions are compiled: by Numba, in less than half of the time that it takes by itself.

`@inner` decorates what only compiled functions call, `@called` what Python calls, and `callback`
makes what machine code calls: ops and kernels.

Numba optimizes a function with all that it calls, and makes machine code of it, before it does the
same to its callers. Most of our functions are small and only called by others, which LLVM inlines
them into. So an inner function is only translated here; optimized and made machine code of is what
it is linked into, and once. Of Numba's steps, those are left out that only closures, exceptions and
expressions of arrays need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite.binding import create_pass_builder, create_pipeline_tuning_options
from numba import types
from numba.core import typed_passes, untyped_passes
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.registry import CPUDispatcher
from numba.core.runtime import rtsys

from cpu_kernels.cache import compiling


class _Outer(JITCodeLibrary):
    """Code that is run: optimized once, with all that it calls."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        options = create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = True
        options.loop_unrolling = False  # what gains by it is written unrolled
        builder = create_pass_builder(self._codegen._tm, options)
        builder.getModulePassManager().run(self._final_module, builder)


class _Unplaced:
    """A code generator for functions that are not in memory as machine code."""

    def __init__(self, codegen: Any) -> None:
        self._codegen = codegen

    def set_env(self, name: str, environment: Any) -> None:
        """Nothing: the environment is for exceptions, which our functions do not raise."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)


class _Inner(_Outer):
    """Code that is only ever linked into other code."""

    @property
    def codegen(self) -> Any:
        return _Unplaced(self._codegen)

    def finalize(self) -> None:
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0


@register_pass(mutates_CFG=False, analysis_only=True)
class _ChooseLibrary(FunctionPass):
    _name = "choose_library"

    def __init__(self) -> None:  # which Numba wants to be written here
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        flags = state.flags
        is_inner = flags.no_cpython_wrapper and flags.no_cfunc_wrapper
        library = _Inner if is_inner else _Outer
        state.library = library(state.targetctx.codegen(), state.func_id.func_qualname)
        if not is_inner:
            state.library.enable_object_caching()
        return False


class _Compiler(CompilerBase):
    """Numba's steps, without those that our functions have no use for."""

    def define_pipelines(self) -> list[PassManager]:
        manager = PassManager("tiered")
        for step, what in (
            (untyped_passes.TranslateByteCode, "bytecode to Numba's representation"),
            (untyped_passes.FixupArgs, "arguments"),
            (untyped_passes.IRProcessing, "checks"),
            (untyped_passes.RewriteSemanticConstants, "constants"),
            (untyped_passes.DeadBranchPrune, "branches that constants decide"),
            (untyped_passes.GenericRewrites, "constant indices"),
            (untyped_passes.ReconstructSSA, "static single assignment"),
            (typed_passes.NopythonTypeInference, "types"),
            (typed_passes.PreLowerStripPhis, "phi nodes"),
            (_ChooseLibrary, "what becomes of it"),
            (typed_passes.IRLegalization, "deletions"),
            (typed_passes.NativeLowering, "to LLVM"),
            (typed_passes.NoPythonBackend, "result"),
        ):
            manager.add_pass(step, what)
        manager.finalize()
        return [manager]


class Inner(CPUDispatcher):
    """A function that compiled functions call. Called from Python, it is run by Python."""

    def __init__(self, function: Callable) -> None:
        options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        super().__init__(
            function, targetoptions={"nopython": True, **options}, pipeline_class=_Compiler
        )

    def get_call_template(self, arguments: Any, keywords: Any) -> Any:
        # Numba would compile it for each constant that it is called with. Only strings choose code.
        kinds = [a if isinstance(a, types.StringLiteral) else types.unliteral(a) for a in arguments]
        return super().get_call_template(tuple(kinds), keywords)

    def __call__(self, *arguments: Any) -> Any:
        return self.py_func(*arguments)


inner = Inner


class _Cache(FunctionCache):
    """Machine code in files. Numba would get ready to compile before it looks for them, which takes
    as long as to load all of a model's kernels, and with SciPy installed, twice as long."""

    def load_overload(self, signature: Any, context: Any) -> Any:
        rtsys.initialize(context)  # whose functions machine code names
        with self._guard_against_spurious_io_errors():
            return self._load_overload(signature, context)


def called(*signatures: str, nogil: bool = False) -> Callable[[Callable], CPUDispatcher]:
    """Decorates a function that Python calls, for the types it is called with, or only those of
    `signatures`. `nogil`: other Python threads run meanwhile."""

    def decorate(function: Callable) -> CPUDispatcher:
        options = {"nopython": True, "error_model": "numpy", "nogil": nogil}
        made = CPUDispatcher(function, targetoptions=options, pipeline_class=_Compiler)
        made._cache = _Cache(function)
        for signature in signatures:
            made.compile(signature)
        if signatures:
            made.disable_compile()
        return made

    return decorate


def callback(function: Callable, num_arguments: int, cache: bool = True) -> CFunc:
    """A function of so many int64 that returns nothing, compiled (or loaded, if there is a
    `cache`): its `address` is for machine code to call."""
    signature = types.void(*[types.int64] * num_arguments)
    made = CFunc(
        function, (signature.args, signature.return_type), {}, {"error_model": "numpy"}, _Compiler
    )
    if cache:
        made._cache = _Cache(function)
    with compiling():
        made.compile()
    return made
