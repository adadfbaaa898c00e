"""What the compile suite reads from the compiler's listings, and what it prints."""

import re
import subprocess
import sys

import pytest

from pallas_kernels import bundles, compile_report, compile_target

LISTING = """
     0   :  { %s1 = inlined_call_operand.hbm } /* entry bundle: %{name} = custom-call(%x.1) */
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2   : > { %v3 = vld [vmem:[#allocation87_spill] sm:$0xff] }
   0x3   : > > { %4 = vmatmul.f32.gmra.mxu2 %v14737_v38 }
   0x4   : > > { %5 = vmatmul.f32.gmra.mxu2 %v14737_v38 }
   0x5   :  { %8235 = vsyncpa [#allocation5 + $0x1], 1 }
"""
SLOTS = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 3 0 1 0
2 0 0 0 0 0 0 0 0 0
4 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 0
"""


def listing(folder, name, slots=SLOTS):
    for number, ending, text in ((70, bundles.SLOTS, slots), (72, bundles.LISTING, LISTING)):
        (folder / f"17-{name}-{number}{ending}").write_text(text.replace("{name}", name))
    (folder / f"17-{name}-71-schedule-analysis_final_bundles.txt").write_text("not a listing")


def test_bundles_of_a_kernel(tmp_path):
    listing(tmp_path, "chunk_pool.1")
    (tmp_path / f"17-TLP-72{bundles.LISTING}").write_text("     0   :  { nothing }")
    found = bundles.kernels(tmp_path)
    assert found == [bundles.Kernel("chunk_pool", [bundles.Loop(2, 0.0), bundles.Loop(2, 0.75)], 4)]


def test_a_listing_of_another_form_is_an_error(tmp_path):
    listing(tmp_path, "chunk_pool.1", SLOTS.rsplit("\n", 2)[0])
    with pytest.raises(ValueError, match="chunk_pool: the listing has 6 bundles, the table of slots 5"):
        bundles.kernels(tmp_path)


def fake(monkeypatch, records):
    monkeypatch.setattr(compile_report, "missing", lambda target: "libtpu" if target == "v6e" else None)
    monkeypatch.setattr(compile_report, "compile_all", lambda target, only: iter(records))


def record(**more):
    sizes = {"seconds": 1.0, "arguments": 2**20, "temporary": 0, "cycles": 12345}
    return {
        "shape": "chunk_pool/max",
        "of": 1,
        "kernels": [["k", [[20, 0.1], [10, 0.5]], 3]],
        "spills": 3,
        **sizes,
        **more,
    }


def test_the_table_is_printed_and_written(monkeypatch, capsys, tmp_path):
    fake(monkeypatch, [record()])
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{compile_report.BEGIN}\nold\n{compile_report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["compile_report", "--targets=v5e,v6e", f"--markdown={page}"])
    assert compile_report.main() == 0
    out = capsys.readouterr().out
    assert "v6e: left out, because libtpu is not installed" in out and "1 of 1 accepted" in out
    line = re.sub(" +", " ", out.splitlines()[3])
    assert line == "| v5e | chunk_pool/max | accepted | 1.0 MiB | 0.0 MiB | 12,345 | 20 (10%) / 10 (50%) | 3 |"
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "12,345" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected one line <!-- table -->"):
        compile_report.main()


def test_a_refusal_is_a_failure(monkeypatch, capsys):
    fake(monkeypatch, [record(), {"shape": "chunk_pool/sum", "of": 2, "error": "Oom: too\nlarge", "kernels": []}])
    monkeypatch.setattr(sys, "argv", ["compile_report", "--targets=v5e"])
    assert compile_report.main() == 1
    out = capsys.readouterr().out
    assert "| REFUSED " in out and "\nv5e chunk_pool/sum: Oom: too large\n1 of 2 accepted" in out


def test_a_dead_compiler_is_a_failure(monkeypatch):
    popen = subprocess.Popen
    dies = [sys.executable, "-c", "import sys; sys.stderr.write('log\\nout of memory'); sys.exit(3)"]
    monkeypatch.setattr(compile_report.subprocess, "Popen", lambda command, **more: popen(dies, **more))
    (found,) = compile_report.compile_all("v5e", [])
    assert found["error"] == "exit code 3: out of memory"


def test_unknown_target(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_report", "--targets=v9"])
    with pytest.raises(SystemExit):
        compile_report.main()
    assert "--targets: unknown v9; known: v5e" in capsys.readouterr().err


def test_no_compiler_here_means_left_out():
    """The project's own environment has neither compiler, or has them both: either way, a name or None."""
    assert {compile_target.missing(t) for t in compile_target.TARGETS} <= {None, "libtpu", "jax_cuda12_plugin"}
