"""The embedded dictionary: its words, its split, its hashes."""

from __future__ import annotations

import hashlib
import re
import sys

import pytest

from kvtool.core.training import pairs
from kvtool.core.training.pairs import Splits, load_cmudict, load_data
from kvtool.errors import FileError

lzma = pytest.importorskip("lzma")


@pytest.fixture(scope="module")
def cmudict() -> Splits:
    return load_cmudict()


@pytest.fixture(scope="module")
def published() -> bytes:
    """The dictionary's text, as published."""
    return lzma.decompress(pairs.CMUDICT_FILE.read_bytes())


def everything(splits: Splits) -> dict[str, tuple[str, ...]]:
    return {p.source: p.targets for p in (*splits.train, *splits.valid, *splits.test)}


def test_the_dictionary_has_the_published_number_of_words_in_the_published_split(cmudict):
    assert len(everything(cmudict)) == 126_052
    assert [len(part) for part in (cmudict.train, cmudict.valid, cmudict.test)] == [
        107_146,
        6_302,
        12_604,
    ]
    entries = [sum(len(p.targets) for p in part) for part in (cmudict.train, cmudict.test)]
    assert entries == [114_626, 13_479]


def test_every_word_and_pronunciation_agrees_with_a_second_parser(cmudict, published):
    line = re.compile(r"(?P<word>\S+?)(\((?P<variant>\d+)\))? (?P<phones>[A-Z0-2 ]+?)( #.*)?")
    expected: dict[str, list[str]] = {}
    for text in published.decode().splitlines():
        match = line.fullmatch(text)
        assert match, text
        phones = " ".join(phone.rstrip("012") for phone in match["phones"].split())
        known = expected.setdefault(match["word"], [])
        if phones not in known:
            known.append(phones)
    assert {word: list(targets) for word, targets in everything(cmudict).items()} == expected


def test_words_fall_into_the_split_by_their_place_in_the_file(cmudict, published):
    heads = (line.split(" ")[0] for line in published.decode().splitlines())
    order = list(dict.fromkeys(re.sub(r"\(\d\)", "", head) for head in heads))
    assert [p.source for p in cmudict.valid] == order[19::20]
    assert [p.source for p in cmudict.test][::2] == order[17::20]
    assert [p.source for p in cmudict.test][1::2] == order[18::20]
    assert not {p.source for p in cmudict.train} & set(
        order[17::20] + order[18::20] + order[19::20]
    )


@pytest.mark.parametrize(
    ("word", "targets"),
    [
        ("a", ("AH", "EY")),
        ("aalborg", ("AO L B AO R G", "AA L B AO R G")),  # its first line ends in a comment
        ("spieth", ("S P IY TH", "S P AY AH TH")),  # so do both of these
        ("a.m.", ("EY EH M",)),
        ("'bout", ("B AW T",)),
    ],
)
def test_variants_join_their_word_and_stress_and_comments_are_gone(cmudict, word, targets):
    assert everything(cmudict)[word] == targets


def test_pronunciations_that_differ_only_in_stress_are_one(cmudict, published):
    text = published.decode()
    assert "\naddict AH0 D IH1 K T\naddict(2) AE1 D IH2 K T\n" in text
    assert "\nimport IH2 M P AO1 R T\nimport(2) IH1 M P AO2 R T\n" in text
    assert everything(cmudict)["addict"] == ("AH D IH K T", "AE D IH K T")
    assert everything(cmudict)["import"] == ("IH M P AO R T",)


def test_the_dictionary_speaks_in_39_phones(cmudict):
    phones = {
        phone for targets in everything(cmudict).values() for t in targets for phone in t.split()
    }
    assert len(phones) == 39
    assert all(phone.isalpha() and phone.isupper() for phone in phones)


def test_the_readme_beside_the_dictionary_states_its_true_hashes(published):
    readme = (pairs.CMUDICT_FILE.parent / "README.md").read_text()
    for data in (published, pairs.CMUDICT_FILE.read_bytes()):
        row = f"{len(data):,} bytes, SHA-256 `{hashlib.sha256(data).hexdigest()}`"
        assert row in readme
    assert hashlib.sha256(published).hexdigest() == pairs.CMUDICT_SHA256


@pytest.mark.parametrize("damage", ["truncated", "other text", "no archive"])
def test_a_damaged_dictionary_is_refused(damage, tmp_path, monkeypatch, published):
    packed = pairs.CMUDICT_FILE.read_bytes()
    data = {
        "truncated": packed[: len(packed) // 2],
        "other text": lzma.compress(published[:-100], preset=0),
        "no archive": b"cmudict",
    }[damage]
    (tmp_path / "cmudict").write_bytes(data)
    monkeypatch.setattr(pairs, "CMUDICT_FILE", tmp_path / "cmudict")
    with pytest.raises(FileError, match="is damaged"):
        load_cmudict()


def test_a_python_without_lzma_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lzma", None)
    with pytest.raises(FileError, match="without the lzma module"):
        load_cmudict()


def test_the_dictionary_is_the_data_called_cmudict(cmudict):
    assert load_data("cmudict") == cmudict


def test_a_test_file_replaces_the_dictionarys_own_test_words(tmp_path, cmudict):
    words = b"%s\tX\nkvtoolish\tY\n" % cmudict.train[0].source.encode()
    (tmp_path / "words.tsv").write_bytes(words)
    splits = load_data("cmudict", test=tmp_path / "words.tsv")
    assert (splits.train, splits.valid, len(splits.test)) == (cmudict.train, cmudict.valid, 2)
    assert splits.notes[0].startswith("1 of 2 test sources are also in the training data")
