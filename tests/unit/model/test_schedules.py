"""Finished programs are read from the files that libtpu writes, and told apart where operations have one name."""

import os
from pathlib import Path

import pytest

from model.cost import Schedule
from scripts.planning.schedules import Schedules, finished_programs

HEAD = """= control target key start
LB: loop body
= control target key end

     0   :  { %s9_s0 = inlined_call_operand.vmem [shape: bf16[SIZE,8], index: 0, kind: input, shape index: {}] \
/* operand 0 */  ;;  %s9_s1 = inlined_call_operand.hbm [shape: f32[8], index: 1, kind: input, shape index: {}]  ;;  \
%s9_s2 = inlined_call_operand.vmem [shape: bf16[SIZE,8], index: 2, kind: output, shape index: {}] } \
/* entry bundle: %fusion.1 = fusion(%x, /*index=5*/%y.2) */
   0x1   :  { %v1 = vld [vmem:[%s9_s0] sm:$0xff] }
"""
LOOP = "   0x2 LB: > { %s2 = sphi }\n   0x3   : > { %v2 = vadd %v1, %v1 }\n   0x4   :  { %4 = sbr.rel }\n"


@pytest.mark.parametrize("before", ["--xla_a=1", None])
def test_libtpu_is_told_to_write_them_as_long_as_they_are_wanted(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if before is None:
        monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    else:
        monkeypatch.setenv("LIBTPU_INIT_ARGS", before)
    with finished_programs():
        told = os.environ["LIBTPU_INIT_ARGS"].split()
        (folder,) = (Path(flag.partition("=")[2]) for flag in told if flag.startswith("--xla_jf_dump_to="))
        assert folder.is_dir()
        assert set(told) > {"--xla_jf_dump_llo_text=true", *filter(None, [before])}
    assert os.environ.get("LIBTPU_INIT_ARGS") == before
    assert not folder.exists()


@pytest.fixture
def schedules(tmp_path: Path) -> Schedules:
    return Schedules(tmp_path)


def test_each_operation_has_the_program_of_its_operands(schedules: Schedules, tmp_path: Path) -> None:
    (tmp_path / "11-fusion.1-01-final_bundles.txt").write_text(HEAD.replace("SIZE", "64") + LOOP)
    (tmp_path / "12-fusion.1-01-final_bundles.txt").write_text(HEAD.replace("SIZE", "32"))
    (tmp_path / "12-fusion.1-00-schedule-analysis_final_bundles.txt").write_text("total scheduled bundles: 2\n")
    (tmp_path / "13-fusion.10-01-final_bundles.txt").write_text("")  # still being written
    assert schedules.of("fusion.1", ("x", "y.2"), ["bf16[64,8]", "f32[8]"]) == Schedule(once=3, each=2)
    assert schedules.of("fusion.1", ("x", "y.2"), ["bf16[32,8]", "f32[8]"]) == Schedule(once=2, each=0)
    assert schedules.of("fusion.1", ("x", "z"), ["bf16[64,8]", "f32[8]"]) is None
    assert schedules.of("fusion.10", ("x", "y.2"), ["bf16[64,8]", "f32[8]"]) is None


def test_a_loop_in_a_loop_is_left_to_libtpus_model(schedules: Schedules, tmp_path: Path) -> None:
    """No text says how often the inner one runs."""
    inner = "   0x9   : >> { %v2 = vadd %v1, %v1 }\n"
    (tmp_path / "1-fusion.1-01-final_bundles.txt").write_text(HEAD.replace("SIZE", "64") + LOOP + inner)
    assert schedules.of("fusion.1", ("x", "y.2"), ["bf16[64,8]", "f32[8]"]) is None
