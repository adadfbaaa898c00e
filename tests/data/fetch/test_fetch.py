"""Corpora made of Debian packages, with small stand-ins for apt-get and dpkg-deb."""

import gzip
import json
import lzma
import os
import stat

import pytest

from atom_jax.data.fetch import __main__ as fetch
from atom_jax.data.fetch import debian, genomes, parallel
from atom_jax.data.fetch.html_text import page_text
from atom_jax.data.sources import open_source
from atom_jax.typing import AtomError

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>one</p><p>two <b>bold</b>,\n  three</p>", "one\ntwo bold, three\n"),
        ("<html><head><title>t</title></head><body><h1>Head</h1>x<br>y<br/>z</body>", "Head\nx\ny\nz\n"),
        ("<p>a<script>if (1 < 2) { '<p>' }</script>b<style>p {}</style></p>", "ab\n"),
        ("<header><p>logo</p></header><div>text &amp; &#28450;&nbsp;&lt;</div><footer>end</footer>", "text & 漢 <\n"),
        ("<nav><aside>x</nav>kept</aside> too", "kept too\n"),
        ("<table><tr><td>a</td><td>b</td></tr></table><!-- no -->", "a\nb\n"),
        ("<p> \n</p>", ""),
        ("no tags", "no tags\n"),
    ],
)
def test_page_text(page, text):
    assert page_text(page) == text


@pytest.fixture
def help_tree(tmp_path):
    """folders of pages: 60 in both languages, one in one only, one empty, one not translated."""
    folders = {"en": tmp_path / "en", "de": tmp_path / "de"}
    for language, folder in folders.items():
        (folder / "sub").mkdir(parents=True)
        for i in range(60):
            (folder / "sub" / f"{i}.html").write_text(f"<p>{language} Seite {i} é</p>")
        (folder / "same.html").write_text("<p>not translated</p>")
        (folder / "empty.html").write_text("<p></p>" if language == "de" else "<p>something</p>")
    (folders["en"] / "alone.html").write_text("<p>alone</p>")
    return folders


def test_the_same_pages_in_the_same_split(help_tree, tmp_path):
    target = tmp_path / "corpora" / "parallel"
    table = parallel.build(help_tree, target)
    names = {}
    for language in help_tree:
        found = [
            [json.loads(line) for line in (target / language / s / "pages.jsonl").read_text("utf-8").splitlines()]
            for s in SPLITS
        ]
        assert all(page["text"].startswith(language) for pages in found for page in pages)
        names[language] = [[page["name"] for page in pages] for pages in found]
        assert len(open_source(str(target / language), "test")) == len(found[2]) > 0
    assert names["en"] == names["de"]
    everything = [n for pages in names["en"] for n in pages]
    assert len(set(everything)) == len(everything) == 60 and len(names["en"][0]) > 40
    assert "60 pages in 2 languages" in table and "de " in table
    assert not (tmp_path / "corpora" / "parallel.part").exists()


def test_no_common_page(help_tree, tmp_path):
    with pytest.raises(AtomError, match="no page is in all"):
        parallel.build({"en": help_tree["en"], "fr": tmp_path / "nothing"}, tmp_path / "out")
    (help_tree["de"] / "same.html").write_bytes(b"<p>\xff</p>")
    with pytest.raises(AtomError, match=r"same.html is not UTF-8 at byte 3"):
        parallel.build(help_tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fasta(tmp_path):
    content = b">one Vibrio cholerae\nacgt\nNN-\n>empty\n\n>two\r\nAC\r\nGT\r\n"
    expected = [("one Vibrio cholerae", b"ACGTNN-"), ("two", b"ACGT")]
    for name, data in (
        ("x.fa", content),
        ("x.fna.gz", gzip.compress(content)),
        ("x.fasta.xz", lzma.compress(content)),
    ):
        (tmp_path / name).write_bytes(data)
        assert list(genomes.read_fasta(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.fa", b"ACGT\n>one\nACGT\n", "x.fa is not FASTA: it does not begin with >"),
        ("x.fa", b"", "not FASTA"),
        ("x.fa", b">one\nAC1T\n", "b'one' has other characters"),
        ("x.fa.gz", b">one\nACGT\n", "cannot be decompressed"),
    ],
)
def test_bad_fasta(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AtomError, match=message):
        list(genomes.read_fasta(tmp_path / name))


def test_a_genus_is_in_one_split(tmp_path):
    tree = tmp_path / "examples"
    files = {
        "E.Coli/contigs.fasta": ">seq1\nAAAA\n>seq2\nACAC\n",
        "E.Coli/references/K12.fasta": ">K12\nAAAACC\n",
        "Staphylococcus_aureus/a.fna": ">contig\nTTTT\n",
        "other/genome.fna": ">CP1 Klebsiella pneumoniae, complete\nGGGG\n",
        "other/again.fna": ">the same\nGGGG\n",
        "H.Pylori/h.fa": ">x\nCCCC\n",
        "V.Cholerae/v.fa": ">x\nCTCT\n",
    }
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "other" / "README").write_text("no sequence")
    (tree / "other" / "again.fna").unlink()
    (tree / "V.Cholerae" / "again.fa").write_text(">y\nCTCT\n")
    target = tmp_path / "dna"
    table = genomes.build([tree], target)
    found = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*.txt")}
    assert found == {
        "train/Escherichia/contigs-1.txt": "AAAA",
        "train/Escherichia/contigs-2.txt": "ACAC",
        "train/Escherichia/K12-1.txt": "AAAACC",
        "train/Klebsiella/genome-1.txt": "GGGG",
        "train/Staphylococcus/a-1.txt": "TTTT",
        "validation/Helicobacter/h-1.txt": "CCCC",
        "test/Vibrio/again-1.txt": "CTCT",
    }
    assert "Escherichia coli" in table and " 14" in table
    assert len(open_source(str(target), "train")) == 5
    (tree / "other" / "unknown.fa").write_text(">mystery\nACGT\n")
    with pytest.raises(AtomError, match="'mystery' name a known species"):
        genomes.build([tree], tmp_path / "other")
    with pytest.raises(AtomError, match="no FASTA file"):
        genomes.build([tmp_path / "nowhere"], tmp_path / "other")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """apt-get and dpkg-deb that know every package but those in $MISSING; a package is its own name."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bin"
    folder.mkdir()

    def tool(name, script):
        (folder / name).write_text("#!/bin/sh\n" + script)
        (folder / name).chmod(stat.S_IRWXU)

    tool(
        "apt-get",
        'for last; do :; done; echo "$@" >> "$LOG"\n'
        '[ "$1" = update ] && exit 100\n'
        'case " $MISSING " in *" $last "*) echo "E: Unable to locate package $last" >&2; exit 100;; esac\n'
        'echo "$last" > "$last"_1.deb\n',
    )
    tool("dpkg-deb", 'mkdir -p "$3/usr" && cp "$2" "$3/usr/name"\n')
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MISSING", "")
    return tmp_path / "log"


def test_unpack_goes_on_where_it_was(tools, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("MISSING", "c")
    with pytest.raises(debian.Unavailable, match="the Debian package c could not be downloaded"):
        debian.unpack(["a", "b", "c"], cache)
    assert "apt-get update failed" in capsys.readouterr().err
    monkeypatch.setenv("MISSING", "a b")
    assert debian.unpack(["a", "b", "c"], cache) == [cache / n for n in "abc"]
    assert [(cache / n / "usr" / "name").read_text() for n in "abc"] == ["a\n", "b\n", "c\n"]
    calls = tools.read_text().count("\n")
    debian.unpack(["a", "b", "c"], cache)
    assert tools.read_text().count("\n") == calls
    assert sorted(p.name for p in cache.iterdir()) == ["a", "b", "c"]


def test_without_debian(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch.main(["dna"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("apt-get is missing") and err.count("\n") == 1


def test_the_handbook_where_the_help_is_missing(tools, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MISSING", "libreoffice-help-ja")
    built = {}
    monkeypatch.setattr(parallel, "build", lambda folders, target: built.update(folders) or "table")
    assert fetch.main(["parallel"]) == 0
    captured = capsys.readouterr()
    assert "trying the Debian handbook" in captured.err and "table" in captured.out
    assert str(built["zh"]).endswith("debian-handbook/usr/share/doc/debian-handbook/html/zh-CN")
    assert set(built) == set(parallel.HELP)
    monkeypatch.setenv("MISSING", "libreoffice-help-ja debian-handbook")
    (tmp_path / ".cache" / "debian" / "debian-handbook" / "usr" / "name").unlink()
    (tmp_path / ".cache" / "debian" / "debian-handbook" / "usr").rmdir()
    (tmp_path / ".cache" / "debian" / "debian-handbook").rmdir()
    assert fetch.main(["parallel"]) == 1
    assert "package debian-handbook could not be downloaded" in capsys.readouterr().err


def test_what_is_there_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora" / "dna").mkdir(parents=True)
    assert fetch.main(["dna"]) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["speech"], ["dna", "a", "b"], ["dna", "--help"]])
def test_usage(arguments, capsys):
    assert fetch.main(arguments) == 1
    assert "usage" in capsys.readouterr().err
