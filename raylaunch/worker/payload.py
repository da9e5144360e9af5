"""train_fn on its way: checked and pickled once on the driver, loaded and run in every worker.

`check_call` and `dump` are called on the driver, `load` and `run_function` by the worker. The pickler comes as an
argument (ray.cloudpickle's, which also takes lambdas and functions of `__main__`): nothing here imports Ray.
"""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raylaunch.errors import ConfigError, Ending, EndKind, RaylaunchError, ending_of
from raylaunch.worker.process_group import is_collateral

Dumps = Callable[[Any], bytes]
Loads = Callable[[bytes], Any]
NoRetry = tuple[type[BaseException], ...]

#: Longest pickled exception that is sent to the driver, in bytes. One that drags a model along isn't worth its way.
EXCEPTION_LIMIT = 10_000_000


class PayloadError(RaylaunchError):
    """The function, its arguments or the `no_retry` types don't load in a worker. No restart can mend it."""


class Terminated(SystemExit):
    """SIGTERM has come while train_fn ran; it leaves as by sys.exit."""


def check_call(fn: Any, args: Any = (), kwargs: Any = None) -> None:
    """Refuse what can't be called so. Better here, at once, than in a thousand workers."""
    if not callable(fn):
        raise ConfigError(f"train_fn={fn!r}: must be callable")
    name = _name(fn)
    if _is(inspect.iscoroutinefunction, fn) or _is(inspect.isasyncgenfunction, fn):
        raise ConfigError(f"train_fn={name}: is a coroutine function; pass `lambda: asyncio.run({name}())` or the like")
    if _is(inspect.isgeneratorfunction, fn):
        raise ConfigError(f"train_fn={name}: is a generator function; calling it would run nothing")
    if not isinstance(args, (tuple, list)):
        raise ConfigError(f"args={args!r}: must be a tuple of the positional arguments, as ({args!r},)")
    if kwargs is not None and not (isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)):
        raise ConfigError(f"kwargs={kwargs!r}: must map argument names to values")
    try:
        # The wrapper's own signature, not the wrapped function's: hydra.main's wrapper takes none of its arguments.
        signature = inspect.signature(fn, follow_wrapped=False)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(*args, **(kwargs or {}))
    except TypeError as error:
        raise ConfigError(f"args, kwargs: don't fit train_fn, which is {name}{signature}: {error}") from None


def dump(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None, dumps: Dumps, no_retry: NoRetry = ()
) -> bytes:
    """What `load` takes. The `no_retry` types travel along, since they may be the user's own classes."""
    kwargs = dict(kwargs or {})
    try:
        return dumps((fn, tuple(args), kwargs, no_retry))
    except Exception as error:  # picklers raise anything
        parts = [(f"train_fn={_name(fn)}", fn), *((f"args[{i}]", arg) for i, arg in enumerate(args))]
        parts += [(f"kwargs[{key!r}]", value) for key, value in kwargs.items()]
        culprit = next((name for name, part in parts if not _dumps_at_all(part, dumps)), "train_fn and its arguments")
        raise ConfigError(
            f"{culprit}: can't be sent to the workers ({type(error).__name__}: {error}). Create it inside train_fn"
        ) from error


def load(data: bytes, loads: Loads = pickle.loads) -> tuple[Callable[[], Any], NoRetry]:
    """What `dump` packed: the call, ready to be made, and the `no_retry` types. Raises `PayloadError`."""
    try:
        fn, args, kwargs, no_retry = loads(data)
    except ModuleNotFoundError as error:
        raise PayloadError(
            f"train_fn doesn't load here: {error}. Install {error.name!r} on every node, or ship it "
            "with runtime_env={'working_dir': ...} (a folder) or runtime_env={'pip': [...]} (a package)"
        ) from error
    except (ImportError, AttributeError) as error:
        raise PayloadError(
            f"train_fn doesn't load here: {error}. The module has another version here than on the driver: ship the "
            "driver's with runtime_env={'working_dir': ...}, or install the same on every node"
        ) from error
    except (Exception, SystemExit) as error:  # loading imports the user's modules, and those do anything
        raise PayloadError(f"train_fn doesn't load here: {type(error).__name__}: {_text(error)}") from error
    # A partial has no frame of its own, so the first frame that a traceback shows is the user's.
    return functools.partial(fn, *args, **kwargs), no_retry


def run_function(call: Callable[[], Any], *, no_retry: NoRetry = (), dumps: Dumps) -> tuple[Ending, Any, bytes | None]:
    """Make the call; how it ended, its value, and the exception where it can be sent. Raises nothing."""
    try:
        return Ending(EndKind.RETURNED), call(), None
    except BaseException as raised:  # how it ended is a value: also SystemExit and KeyboardInterrupt
        error, own_frames = raised, 1
        if isinstance(raised, Terminated) and raised.__context__ is not None:
            # It was on its way out already: what it failed with is the news. That was raised below this frame.
            error, own_frames = raised.__context__, 0
        collateral = is_collateral(error)
        # What only follows another worker's end is nobody's fault here: gloo's RuntimeErrors are not the user's.
        fatal = isinstance(error, no_retry) and not collateral
        ending = ending_of(error, collateral=collateral, fatal=fatal, skip_frames=own_frames)
        return ending, None, None if ending.kind is EndKind.RETURNED else _sendable(error, dumps)


def _sendable(error: BaseException, dumps: Dumps) -> bytes | None:
    """The pickled exception, proven to load again; None when it can't be sent.

    Many pickle well and don't load, for want of their constructor's arguments: those go in parts.
    """
    for form in (error, _Parts(error)):
        try:
            data = dumps(form)
            if len(data) > EXCEPTION_LIMIT:
                return None
            if isinstance(pickle.loads(data), BaseException):  # noqa: S301 - just made
                return data
        except (Exception, SystemExit):  # noqa: S112 - picklers and constructors raise anything
            continue
    return None


class _Parts:
    """An exception on its way, to be put together again without its constructor."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _together, (type(self._error), self._error.args, vars(self._error))


def _together(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    vars(error).update(state)
    return error


def _dumps_at_all(part: Any, dumps: Dumps) -> bool:
    try:
        dumps(part)
    except Exception:
        return False
    return True


def _is(kind: Callable[[Any], bool], fn: Any) -> bool:
    """Whether a function, or an object's `__call__`, is of this kind."""
    return kind(fn) or kind(getattr(type(fn), "__call__", None))  # noqa: B004 - looked at, not called


def _name(fn: Any) -> str:
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its message can't be shown)"
