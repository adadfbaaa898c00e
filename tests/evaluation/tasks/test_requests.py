import gzip

import pytest

from atom_jax.data.fetch import evaldata
from atom_jax.data.fetch.evaldata import Layout
from atom_jax.evaluation.tasks import requests
from atom_jax.typing import AtomError
from tests.evaluation.conftest import rows

DOCUMENTS = [
    (("Q: one", "Q: one"), (" a", " b"), 1),
    (("Q: two", "Q: two", "Q: two"), (" a", " cc", " d"), 0),
    (("x Ann", "x Bob"), (" ran.", " ran."), 1),
]


def test_doubled_file_gives_every_document_once(write):
    write("set/rc", rows(DOCUMENTS, "Answer:"), Layout(3, doubled=True))
    found = requests.read("set/rc")
    assert [r.document for r in found] == [0, 1, 2]
    assert [(r.contexts, r.continuations, r.gold) for r in found] == DOCUMENTS
    assert {r.neutral for r in found} == {"Answer:"}


def test_single_file(write):
    write("set/mc", rows(DOCUMENTS), Layout(3))
    assert [(r.contexts, r.continuations, r.gold, r.neutral) for r in requests.read("set/mc")] == [
        (*d, None) for d in DOCUMENTS
    ]


def test_one_continuation_ignores_the_label(write):
    lines = rows([(("the last",), (" word",), ["word"])])
    write("lambada/bpb_0shot", lines, Layout(1))
    assert requests.read("lambada/bpb_0shot")[0].gold == 0


def without(n):
    return lambda lines: lines[:n] + lines[n + 1 :]


def changed(n, **fields):
    return lambda lines: [*lines[:n], lines[n] | fields, *lines[n + 1 :]]


@pytest.mark.parametrize(
    ("change", "doubled", "message"),
    [
        (lambda lines: lines, False, "expected 0 documents with a neutral context, found 3"),
        (lambda lines: lines[:7], True, "expected 3 documents with a neutral context, found 0"),
        (lambda lines: lines[:12], True, "expected 3 documents with a neutral context, found 2"),
        (lambda lines: lines + lines[:7], True, "choice 0 where 2 is due"),
        (without(0), True, "choice 1 where 0 is due"),
        (without(6), True, "same answers after a neutral"),
        (changed(8, request={"context": "Answer:", "continuation": " z"}), True, "same answers after a neutral"),
        (changed(7, request={"context": "Q: one", "continuation": " a"}), True, "same answers after a neutral"),
        (changed(0, label=0), True, "disagree"),
        (changed(1, doc_id=9), True, "choice 1 where 0 is due"),
        (changed(0, doc_id=2_000_000), True, "out of range"),
        (changed(0, doc_id="0"), True, "line 1: a field of the request has the wrong type"),
        (changed(3, request={"context": "c", "continuation": ""}), True, "line 4"),
        (changed(3, request={"context": "c"}), True, "line 4: not a request"),
        (lambda lines: [{"doc": 1}], True, "line 1: not a request"),
        (lambda lines: lines[:2] + lines[7:9], True, "expected documents 0 to 2"),
    ],
)
def test_unexpected_layout_is_refused(write, change, doubled, message):
    path = write("set/rc", change(rows(DOCUMENTS, "Answer:")), Layout(3, doubled))
    with pytest.raises(AtomError, match=message) as e:
        requests.read("set/rc")
    assert str(path) in str(e.value)


@pytest.mark.parametrize("gold", [2, -1, "1", None, True])
def test_label_out_of_range(write, gold):
    write("set/mc", rows([(("c", "c"), (" a", " b"), gold)]), Layout(1))
    with pytest.raises(AtomError, match="document 0: label"):
        requests.read("set/mc")


def test_damaged_file(write):
    path = write("set/mc", rows(DOCUMENTS), Layout(3))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AtomError, match="damaged"):
        requests.read("set/mc")
    path.write_bytes(b"not gzip")
    with pytest.raises(AtomError, match="damaged"):
        requests.read("set/mc")
    path.write_bytes(gzip.compress(b"{oops\n"))
    with pytest.raises(AtomError, match="damaged"):
        requests.read("set/mc")


def test_missing_file_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOM_EVALDATA", str(tmp_path))
    with pytest.raises(AtomError, match="make evaldata"):
        requests.read("lambada/bpb_0shot")


def test_subset_is_seeded_and_in_order():
    assert requests.subset(5, 0, 0) == requests.subset(5, 5, 1) == [0, 1, 2, 3, 4]
    some = requests.subset(5000, 200, 0)
    assert some == requests.subset(5000, 200, 0) == sorted(set(some)) and len(some) == 200
    assert some != requests.subset(5000, 200, 1)
    assert max(some) > 4000


def test_real_files_are_as_expected():
    if not evaldata.directory().is_dir():
        pytest.skip("the evaluation sets are not here: run `make evaldata`")
    for file in ("lambada/bpb_0shot", "arc_easy/rc_0shot", "piqa/rc_0shot", "winogrande/rc_0shot", "boolq/rc_0shot"):
        documents = requests.read(file)
        assert (documents[0].neutral == "Answer:") == evaldata.FILES[file].doubled
