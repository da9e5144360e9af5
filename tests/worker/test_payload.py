"""train_fn on its way: refused early, packed once, loaded, and run so that every way to leave is a value."""

from __future__ import annotations

import functools
import pickle
import signal
import sys
import threading

import pytest
import ray.cloudpickle

from raylaunch.errors import ConfigError, EndKind
from raylaunch.worker.payload import EXCEPTION_LIMIT, PayloadError, check_call, dump, load, run_function

dumps = ray.cloudpickle.dumps


def train(config, lr=0.1):
    return config, lr


async def atrain():
    pass


async def agenerator():
    yield


def generator():
    yield


class AsyncCallable:
    async def __call__(self):
        pass


class Callable:
    def __call__(self, config):
        return config


def injecting(function):
    """As hydra.main: the wrapper takes none of the arguments of what it wraps."""

    @functools.wraps(function)
    def wrapper():
        return function({})

    return wrapper


@pytest.mark.parametrize(
    ("fn", "args", "kwargs"),
    [
        (train, ({},), None),
        (train, [{}], {"lr": 1.0}),
        (functools.partial(train, {}), (), {"lr": 1.0}),
        (lambda: 1, (), {}),
        (Callable(), ({},), None),
        (injecting(train), (), None),
        (print, ("no signature is needed",), None),
        (dict.fromkeys, ([],), None),
        (type, ("builtin without a signature",), None),
    ],
)
def test_a_call_that_fits(fn, args, kwargs):
    check_call(fn, args, kwargs)


@pytest.mark.parametrize(
    ("fn", "args", "kwargs", "words"),
    [
        ("train.py", (), None, "train_fn='train.py': must be callable"),
        (atrain, (), None, "train_fn=atrain: is a coroutine function"),
        (agenerator, (), None, "train_fn=agenerator: is a coroutine function"),
        (AsyncCallable(), (), None, "train_fn=AsyncCallable: is a coroutine function"),
        (functools.partial(atrain), (), None, "is a coroutine function"),
        (generator, (), None, "train_fn=generator: is a generator function"),
        (train, (), None, r"train\(config, lr=0.1\): missing a required argument: 'config'"),
        (train, ({},), {"rl": 1}, "got an unexpected keyword argument 'rl'"),
        (train, (1, 2, 3), None, "too many positional arguments"),
        (train, "config", None, r"args='config': must be a tuple .* as \('config',\)"),
        (train, (), [1], r"kwargs=\[1\]: must map"),
        (train, (), {1: 2}, "kwargs={1: 2}: must map"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(fn, args, kwargs, words):
    with pytest.raises(ConfigError, match=words):
        check_call(fn, args, kwargs)


def test_what_was_packed_is_called_with_its_arguments():
    class Mine(Exception):
        pass

    call, no_retry = load(dump(lambda a, b: (a, b), (1,), {"b": 2}, dumps, (Mine,)))
    assert call() == (1, 2)
    assert [kind.__name__ for kind in no_retry] == ["Mine"]


def test_a_pickler_that_is_not_pickles_own_brings_its_unpickler():
    call, _ = load(dump(int, ("7",), None, lambda value: dumps(value)[::-1]), lambda data: pickle.loads(data[::-1]))
    assert call() == 7


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((1, threading.Lock()), {}, r"args\[1\]: can't be sent to the workers \(TypeError: cannot pickle"),
        ((1,), {"lock": threading.Lock()}, r"kwargs\['lock'\]: can't be sent"),
    ],
)
def test_what_cannot_be_packed_is_named(args, kwargs, words):
    with pytest.raises(ConfigError, match=words):
        dump(train, args, kwargs, dumps)


def test_a_function_that_cannot_be_packed_is_named():
    lock = threading.Lock()

    def closes_over_a_lock():
        return lock

    with pytest.raises(ConfigError, match="train_fn=closes_over_a_lock: can't be sent"):
        dump(closes_over_a_lock, (), None, dumps)


@pytest.fixture
def packed_elsewhere(tmp_path, monkeypatch):
    """Packs `only_here.train`, then leaves a worker with another `only_here` or none."""

    def pack(then: str | None) -> bytes:
        module = tmp_path / "only_here.py"
        module.write_text("def train(): return 1\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        import only_here

        data = dump(only_here.train, (), None, dumps)
        del sys.modules["only_here"]
        module.unlink()
        if then is not None:
            module.write_text(then)
        return data

    yield pack
    sys.modules.pop("only_here", None)


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (None, "No module named 'only_here'. Install 'only_here' on every node, or ship it with runtime_env="),
        ("import wandbbb", "No module named 'wandbbb'. Install 'wandbbb' on every node"),
        ("from json import no_such", "another version here than on the driver"),
        ("train_another = 1", "another version here than on the driver: ship the driver's with runtime_env="),
        ("raise ValueError('at import')", "ValueError: at import"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_what_does_not_load_says_what_is_missing_and_what_to_do(packed_elsewhere, then, words):
    data = packed_elsewhere(then)
    with pytest.raises(PayloadError, match=r"^train_fn doesn't load here: ") as caught:
        load(data)
    assert words in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def run(function, no_retry=()):
    return run_function(function, no_retry=no_retry, dumps=dumps)


def raising(error):
    def train_fn():
        raise error

    return train_fn


class NeedsArguments(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


class HoldsALock(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class NoText(Exception):
    def __str__(self):
        raise KeyError("no text")


class NotAnException(Exception):
    def __reduce__(self):
        return int, ("3",)


def test_a_value():
    ending, value, sent = run(lambda: {"loss": 0.1})
    assert (ending.kind, value, sent) == (EndKind.RETURNED, {"loss": 0.1}, None)


def test_an_exception_arrives_with_the_users_frames_only():
    ending, value, sent = run(raising(ValueError("no such column")))
    assert (ending.kind, ending.error_type, ending.message) == (EndKind.RAISED, "ValueError", "no such column")
    assert not ending.collateral
    assert not ending.fatal
    assert value is None
    assert "train_fn" in ending.traceback
    assert "raylaunch/worker" not in ending.traceback
    assert repr(pickle.loads(sent)) == "ValueError('no such column')"


def test_no_retry_makes_it_fatal_subclasses_too():
    assert run(raising(FileNotFoundError("data")), no_retry=(KeyError, OSError))[0].fatal
    assert not run(raising(ValueError()), no_retry=(KeyError, OSError))[0].fatal


@pytest.mark.parametrize(
    ("code", "kind", "number"),
    [
        (None, EndKind.RETURNED, None),
        (0, EndKind.RETURNED, None),
        (3, EndKind.EXITED, 3),
        ("wrong data", EndKind.EXITED, 1),
    ],
)
def test_sys_exit_is_a_value(code, kind, number):
    ending, _, sent = run(lambda: sys.exit(code))
    assert (ending.kind, ending.exit_code) == (kind, number)
    assert (sent is None) == (kind is EndKind.RETURNED)


def test_ctrl_c_is_a_value():
    ending, _, _ = run(lambda: signal.raise_signal(signal.SIGINT))
    assert (ending.kind, ending.error_type) == (EndKind.RAISED, "KeyboardInterrupt")


def test_an_exception_that_cannot_be_sent_is_told_all_the_same():
    ending, _, sent = run(raising(HoldsALock()))
    assert sent is None
    assert ending.message == str(HoldsALock())
    assert ending.error_type.endswith("HoldsALock")


@pytest.mark.parametrize("error", [NeedsArguments(1, 2), NotAnException("mine")])
def test_an_exception_that_does_not_unpickle_by_itself_arrives_whole(error):
    _, _, sent = run(raising(error))
    arrived = pickle.loads(sent)
    assert type(arrived) is type(error)
    assert (arrived.args, vars(arrived)) == (error.args, vars(error))


def test_an_exception_too_big_to_send_is_not_sent():
    ending, _, sent = run(raising(ValueError("x" * EXCEPTION_LIMIT)))
    assert sent is None
    assert len(ending.message) < 3000


def test_an_exception_of_main_is_sent():
    kind = type("OfMain", (Exception,), {"__module__": "__main__"})
    ending, _, sent = run(raising(kind("mine")))
    assert ending.error_type == "OfMain"
    assert str(pickle.loads(sent)) == "mine"


def test_an_exception_without_a_text():
    ending, _, _ = run(raising(NoText()))
    assert ending.error_type.endswith("NoText")
    assert "can't be shown" in ending.message


def test_endless_recursion():
    def deeper():
        return deeper()

    ending, _, sent = run(deeper)
    assert ending.error_type == "RecursionError"
    assert isinstance(pickle.loads(sent), RecursionError)


def test_no_memory():
    ending, _, sent = run(lambda: bytearray(1 << 60))
    assert ending.error_type == "MemoryError"
    assert isinstance(pickle.loads(sent), MemoryError)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups came with Python 3.11")
def test_an_exception_group():
    ending, _, sent = run(raising(BaseExceptionGroup("both", [ValueError(1), KeyboardInterrupt()])))  # noqa: F821
    assert ending.error_type == "BaseExceptionGroup"
    assert len(pickle.loads(sent).exceptions) == 2
