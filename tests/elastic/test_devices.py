"""Device strings: the whole grammar, what is refused and with which words, and what they come to on a cluster."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylaunch import ConfigError
from raylaunch.elastic.devices import GRAMMAR, INDEX_LIMIT, NodeDevices, parse_devices, resolve

EIGHT = {"CPU": 16.0, "GPU": 8.0}
FOUR = {"CPU": 4.0, "GPU": 4.0}
NONE = {"CPU": 4.0}


@pytest.mark.parametrize(
    ("text", "kind", "entries"),
    [
        ("auto", "auto", None),
        ("cpu", "cpu", None),
        (" cuda ", "cuda", None),
        ("cuda:0", "cuda", (0,)),
        ("cuda:0,2-3", "cuda", (0, 2, 3)),
        ("cuda: 0, 1 - 2 ,5", "cuda", (0, 1, 2, 5)),
        ("cpu:*", "cpu", (None,)),
        ("auto:*", "auto", (None,)),
        ("cuda:0,0", "cuda", (0, 0)),
        ("cuda:3-3", "cuda", (3,)),
    ],
)
def test_what_is_allowed(text, kind, entries):
    devices = parse_devices(text)
    assert (devices.kind, devices.entries) == (kind, entries)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cudaX:0", "there is no kind of device 'cudaX'"),
        ("autofoo:1", "there is no kind of device 'autofoo'"),
        ("mps", "there is no kind of device 'mps'"),
        ("CUDA", "there is no kind of device 'CUDA'"),
        ("", "there is no kind of device ''"),
        ("cuda:", "an index is missing"),
        ("cuda:0,", "an index is missing"),
        ("cuda:0-", "'0-' is neither an index, nor a range, nor *"),
        ("cuda:-1", "'-1' is neither an index, nor a range, nor *"),
        ("cuda:0:1", "'0:1' is neither an index"),
        ("cuda:1 2", "'1 2' is neither an index"),
        ("cuda:٣", "'٣' is neither an index"),
        ("cuda:**", r"'**' is neither an index"),
        ("cuda:0\n", r"'0\n' is neither an index"),
        ("cuda:5-3", "the range '5-3' ends before it begins; did you mean 3-5?"),
        ("cuda:0-99999999999", "'0-99999999999': indices are below 4096"),
        (0, "is no string"),
    ],
)
def test_what_is_refused_and_with_the_grammar(text, words):
    with pytest.raises(ConfigError, match="^" + re.escape(f"devices={text!r}: {words}")) as caught:
        parse_devices(text)
    assert GRAMMAR in str(caught.value)


indices = st.integers(0, INDEX_LIMIT - 1)
items = st.one_of(
    indices.map(lambda i: (str(i), [i])),
    st.tuples(indices, indices)
    .filter(lambda pair: pair[0] <= pair[1])
    .map(lambda pair: (f"{pair[0]}-{pair[1]}", list(range(pair[0], pair[1] + 1)))),
    st.just(("*", [None])),
)
spaces = st.sampled_from(["", " ", "  "])


@given(st.sampled_from(["auto", "cpu", "cuda"]), st.lists(st.tuples(spaces, items, spaces), min_size=1, max_size=6))
def test_every_string_of_the_grammar_is_read_as_it_was_written(kind, parts):
    text = f"{kind}:" + ",".join(f"{before}{item[0]}{after}" for before, item, after in parts)
    assert parse_devices(text).entries == tuple(entry for _, item, _ in parts for entry in item[1])


@given(st.text(st.sampled_from("audcop:0123,-* x"), max_size=16))
def test_anything_is_read_or_refused_and_nothing_else(text):
    try:
        devices = parse_devices(text)
    except ConfigError as error:
        refusal = str(error)
    else:
        refusal = GRAMMAR
        item = r" *([0-9]+( *- *[0-9]+)?|\*) *"
        assert re.fullmatch(rf" *(auto|cpu|cuda)(:{item}(,{item})*)? *", text)
        assert devices.entries is None or devices.entries
    assert GRAMMAR in refusal


@pytest.mark.parametrize(
    ("text", "nodes", "min_nodes", "expected"),
    [
        ("auto", [NONE], 1, NodeDevices("cpu", 1)),
        ("auto", [NONE, EIGHT], 1, NodeDevices("cuda", 1)),
        ("auto", [NONE, EIGHT], 2, NodeDevices("cpu", 1)),  # two nodes with GPUs there are not
        ("auto:*", [NONE, EIGHT], 1, NodeDevices("cuda", 8)),
        ("auto:*", [NONE, NONE], 2, NodeDevices("cpu", 4)),
        ("cpu", [], 1, NodeDevices("cpu", 1)),
        ("cpu:0-2", [], 1, NodeDevices("cpu", 3)),
        ("cpu:0,0", [], 1, NodeDevices("cpu", 2)),
        ("cpu:*", [NONE, EIGHT], 1, NodeDevices("cpu", 16)),
        ("cpu:*", [NONE, EIGHT], 2, NodeDevices("cpu", 4)),  # as many as both nodes have
        ("cuda", [EIGHT], 1, NodeDevices("cuda", 1)),
        ("cuda:*", [EIGHT, FOUR], 1, NodeDevices("cuda", 8)),
        ("cuda:*", [EIGHT, FOUR], 2, NodeDevices("cuda", 4)),
        ("cuda:2,0", [EIGHT], 1, NodeDevices("cuda", 2, 1, (0, 2))),
        ("cuda:0,0", [EIGHT], 1, NodeDevices("cuda", 2, 2, (0,))),
        ("cuda:*,*", [FOUR], 1, NodeDevices("cuda", 8, 2)),
        ("cuda:0-3", [FOUR], 1, NodeDevices("cuda", 4, 1, (0, 1, 2, 3))),
    ],
)
def test_what_it_comes_to_on_a_cluster(text, nodes, min_nodes, expected):
    assert resolve(parse_devices(text), nodes, min_nodes) == expected


@pytest.mark.parametrize(
    ("text", "nodes", "min_nodes", "words"),
    [
        ("cuda:9", [EIGHT], 1, "no node is there with a GPU of index 9: the most that a node has is 8"),
        ("cuda:4", [EIGHT, FOUR], 2, "there are no 2 nodes with a GPU of index 4: the most that a node has is 8"),
        ("cuda:*", [NONE], 1, "no node is there with a GPU"),
        ("cuda:*", [EIGHT], 2, "there are no 2 nodes with a GPU"),
        ("cuda:0,0,1", [EIGHT], 1, "each GPU must be given equally often"),
    ],
)
def test_what_the_nodes_do_not_have_is_refused(text, nodes, min_nodes, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        resolve(parse_devices(text), nodes, min_nodes)
    assert GRAMMAR in str(caught.value)


@given(st.integers(1, 128), st.integers(1, 16))
def test_processes_that_share_gpus_reserve_whole_ones_together_or_are_refused(sharing, gpus):
    text = "cuda:" + ",".join([f"0-{gpus - 1}"] * sharing)
    try:
        found = resolve(parse_devices(text), [{"GPU": 16.0}])
    except ConfigError:
        assert sharing > 48
    else:
        assert (found.share * found.per_node, len(found.names)) == (gpus, sharing * gpus)
